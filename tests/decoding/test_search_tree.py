"""The tree that is shown is the search that was made."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
from rich.console import Console

from handspun.cli.views.explain import search_tree
from handspun.decoding.explain import BeamTrace, TreeNode
from handspun.decoding.generate import generate, stream
from handspun.errors import ConfigError
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

_CHAT = ChatModel(tiny_model("qwen2", eos_token_id=[3, 7]), tiny_tokenizer(), "tiny")
_OPTIONS: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 12}


def _path(nodes: list[TreeNode], place: int | None) -> list[int]:
    ids: list[int] = []
    while place is not None:
        ids.insert(0, nodes[place].token_id)
        place = nodes[place].parent
    return ids


def test_a_search_of_two_steps_worked_out_by_hand() -> None:
    tree = BeamTrace(2, str)
    tree.grow([0, 0, 1], [5, 6, 5], [-1.0, -2.0, -1e9], ended=[], beams=[0, 1])
    tree.grow([1, 0], [7, 8], [-2.5, -3.0], ended=[0], beams=[1, None])
    assert tree.with_answers([[6, 7]]) == [
        TreeNode(parent=None, token_id=5, text="5", score=-1.0),
        TreeNode(parent=None, token_id=6, text="6", score=-2.0),
        TreeNode(parent=1, token_id=7, text="7", score=-2.5, ended=True, return_index=0),
        TreeNode(parent=0, token_id=8, text="8", score=-3.0),
    ]
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        console.print(search_tree(tree.with_answers([[6, 7]])))
    assert captured.get().splitlines()[1:] == ["   -3.00 ├ '58'  given up", "   -2.50 └ '67'  answer 1"]


@pytest.mark.parametrize("options", [{}, {"min_new_tokens": 4}, {"choice": ("yes", "no")}], ids=str)
def test_the_answers_are_paths_of_the_tree_with_their_log_probabilities(options: dict[str, Any]) -> None:
    prompts = ["Hi", "Tell me a joke."]
    answers = generate(_CHAT, prompts, show_tree=True, logprobs=True, **_OPTIONS, **options)
    plain = generate(_CHAT, prompts, **_OPTIONS, **options)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]
    for prompt in range(2):
        mine = [answer for answer in answers if answer.prompt_index == prompt]
        nodes = mine[0].tree
        assert all(answer.tree is None for answer in mine[1:])
        ends = {node.return_index: i for i, node in enumerate(nodes) if node.return_index is not None}
        assert len(ends) == len(mine)
        for answer in mine:
            assert _path(nodes, ends[answer.return_index]) == answer.token_ids
            if not options:  # without processors the score is the model's own
                assert nodes[ends[answer.return_index]].score == pytest.approx(sum(answer.logprobs), abs=1e-3)


def test_a_stream_has_the_tree_step_by_step() -> None:
    chunks = list(stream(_CHAT, ["Hi", "Tell me a joke."], show_tree=True, **_OPTIONS))
    for prompt in range(2):
        mine = [chunk for chunk in chunks if chunk.prompt_index == prompt]
        [tree] = [
            chunk.result.tree for chunk in mine if chunk.result is not None and chunk.result.tree is not None
        ]
        steps = [chunk.tree_nodes for chunk in mine if chunk.tree_nodes]
        assert [node for step in steps for node in step] == [replace(node, return_index=None) for node in tree]
        assert len(steps) > 4
    plain = stream(_CHAT, ["Hi", "Tell me a joke."], **_OPTIONS)
    assert [chunk.text for chunk in plain if chunk.text] == [chunk.text for chunk in chunks if chunk.text]


def test_nodes_are_only_of_real_beams_and_each_is_there_once() -> None:
    [best, *_] = generate(_CHAT, "Hi", show_tree=True, **_OPTIONS)
    places = [(node.parent, node.token_id) for node in best.tree]
    assert len(set(places)) == len(places)
    assert all(node.score > -1e6 for node in best.tree)
    assert len([node for node in best.tree if node.parent is None]) <= 4
    assert asdict(best)["tree"][0]["parent"] is None


def test_a_cancelled_search_has_its_tree_too() -> None:
    for steps in range(3):
        calls = iter([False] * steps)
        answers = generate(_CHAT, "Hi", show_tree=True, should_stop=partial(next, calls, True), **_OPTIONS)
        assert {answer.finish_reason for answer in answers} == {"cancelled"}
        assert len(answers[0].token_ids) == steps
        assert (answers[0].tree == []) == (steps == 0)


@pytest.mark.parametrize(
    ("answer", "marked"),
    [([5], [0]), ([6], [1]), ([5, 8], [2]), ([9], []), ([9, 8], []), ([5, 9], []), ([5, 8, 9], []), ([], [])],
    ids=str,
)
def test_the_last_node_of_an_answer_is_marked_and_none_of_one_that_was_no_beam(answer: Any, marked: Any) -> None:
    tree = BeamTrace(2, str)
    tree.grow([0, 0], [5, 6], [-1.0, -2.0], ended=[], beams=[0, 1])
    tree.grow([0, 1], [8, 8], [-2.0, -3.0], ended=[], beams=[0, 1])
    nodes = tree.with_answers([answer])
    assert [i for i, node in enumerate(nodes) if node.return_index is not None] == marked


def test_a_tree_without_beams_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--show-tree needs a beam search"):
        generate(_CHAT, "Hi", show_tree=True)
