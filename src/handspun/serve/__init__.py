"""`handspun serve`: an HTTP server with OpenAI's interface."""
