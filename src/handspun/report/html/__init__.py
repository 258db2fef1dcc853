"""report.html: what a run's folder holds, as one page that tells the whole story."""
