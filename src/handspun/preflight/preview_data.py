"""What would be trained on, as `handspun preview` prints it and Python returns it."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from handspun.config import DataConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import Dataset, ExampleCache, check_small_files, load_splits, resolve_max_length
from handspun.data.examples import DataReport, Example
from handspun.data.preview import bracketed, spread
from handspun.data.rendering import choose_template
from handspun.data.rows import check_data_exists
from handspun.errors import ConfigError
from handspun.files import cache_folder
from handspun.models.embedding_rows import check_examples, embedding_rows_of
from handspun.models.load import context_length, is_on_disk, load_config, load_tokenizer, model_source
from handspun.preflight.print import account_lines, length_lines


@dataclass(frozen=True, repr=False)
class Preview:
    """Examples as they would be trained on. Its text shows some, all lengths, and what became of every row.

    dataset: all examples, with a report on their rows. shown: the examples in the text.
    """

    dataset: Dataset
    shown: list[Example]
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    @property
    def report(self) -> DataReport:
        """Rows read, kept, truncated and dropped, with the reasons."""
        return self.dataset.account

    def title(self, example: Example) -> str:
        """Return a line on where an example comes from and how long it is."""
        return f"{example.file}, row {example.row}: {len(example)} tokens, {example.learned_tokens} trained on"

    def summary(self) -> list[str]:
        """Return the lines below the examples."""
        account = account_lines(self.report, max_length=self.max_length)
        return [*length_lines(self.dataset.examples), "", *account]

    def __repr__(self) -> str:
        """Return the whole text, so that a notebook shows it."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield "tokens trained on are between ⟦ and ⟧\n"
        for example in self.shown:
            yield f"--- {self.title(example)}"
            yield bracketed(example, self.tokenizer)
        yield "---\n"
        yield from self.summary()


def preview_data(config: DataConfig, model: str, *, examples: int) -> Preview:
    """Return what would be trained on. Reads no weights. Raises DataError, ModelError, or TemplateError."""
    if examples < 1:
        raise ConfigError(f"examples is {examples}: expected at least 1.")
    check_data_exists(*config.sources)
    if not is_on_disk(model):
        check_small_files(config, config.sources)
    source = model_source(model)
    tokenizer = load_tokenizer(source)
    choose_template(tokenizer, config.chat_template)
    max_length = resolve_max_length(config.max_length, context_length(load_config(source)))
    made, _ = load_splits(
        config,
        ChatTemplate(tokenizer, config.template_values),
        max_length=max_length,
        cache=ExampleCache(cache_folder() / "examples"),
    )
    check_examples(made.examples, embedding_rows_of(source), tokenizer, model)
    return Preview(made, list(spread(made.examples, examples)), tokenizer, max_length)
