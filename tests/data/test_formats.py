"""The format of a file, judged by its columns."""

import pytest

from handspun.data.formats import recognize_format, used_columns
from handspun.errors import DataError


@pytest.mark.parametrize(
    ("columns", "data_format"),
    [
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "output", "text"], "alpaca"),
        (["prompt", "completion", "label"], "prompt-completion"),
        (["prompt", "prompt_id", "messages"], "messages"),
        (["id", "conversations", "tools"], "sharegpt"),
    ],
)
def test_the_columns_tell_the_format(columns: list[str], data_format: str) -> None:
    assert recognize_format(columns, "a.csv") == data_format


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (["instructions", "output"], "Rename 'instructions' to 'instruction'."),
        (["instruction", " Output"], "Rename ' Output' to 'output'."),
        (["conversation"], "Rename 'conversation' to 'conversations'."),
        (["Completions"], "Did you mean 'completion' for 'Completions'?"),  # which makes no format by itself
        (["prompt", "outputs"], "sharegpt needs conversations. Rename 'outputs' to 'completion'."),
        (["prompt", "chosen", "rejected"], "to train on the preferred answer, name it `completion`"),
        (["question", "answer"], "Rename 'question' to 'prompt' and 'answer' to 'completion'."),
        (["question_id", "turns"], "`turns` are questions without answers"),
        (
            [],
            "Found: none. Expected: plain text needs text; alpaca needs instruction and output; prompt-",
        ),
    ],
)
def test_columns_of_no_format_are_listed_with_what_is_near(columns: list[str], hint: str) -> None:
    with pytest.raises(DataError, match=r"a.csv: the columns fit no format\. Found: ") as caught:
        recognize_format(columns, "a.csv")
    assert hint in str(caught.value)


def test_no_hint_where_nothing_is_near() -> None:
    with pytest.raises(DataError) as caught:
        recognize_format(["instruction", "input"], "a.csv")
    assert str(caught.value).endswith(
        "sharegpt needs conversations. Or name yours, as in --columns prompt=instruction,completion=input."
    )


def test_two_columns_are_in_the_example_of_the_remedy() -> None:
    with pytest.raises(DataError, match="as in --columns prompt=Frage,completion=Antwort"):
        recognize_format(["Frage", "Antwort"], "a.csv")
    with pytest.raises(DataError, match="as in --columns prompt=Question,completion=Reply"):
        recognize_format(["Frage", "Antwort", "Nummer"], "a.csv")


def test_columns_of_several_formats_are_for_the_user_to_choose() -> None:
    with pytest.raises(DataError, match=r"fit several formats: alpaca, messages\. Choose one with --data-format"):
        recognize_format(["instruction", "output", "messages"], "a.csv")


def test_used_columns() -> None:
    assert {"instruction", "input", "output", "history", "system", "tools"} <= used_columns("alpaca")
    assert not {"label", "messages", "prompt", "text", "id"} & used_columns("alpaca")
    assert {"messages", "tools", "label", "images"} <= used_columns("messages")
    assert {"prompt", "completion"} <= used_columns("prompt-completion")
    assert "conversations" in used_columns("sharegpt")
