"""What a beam search looked at: the tree of all beams that it kept for a step at least, and of what has ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class TreeNode:
    """One token of one or several beams."""

    parent: int | None
    """Place of the node before it in the list of nodes; None for an answer's first token."""
    token_id: int
    text: str
    score: float
    """Accumulated log-probability, of the processed distribution."""
    ended: bool = False
    """Whether an answer is complete with it."""
    return_index: int | None = None
    """Which of the returned answers ends with it."""


class SearchTree:
    """The nodes of one search as it goes on."""

    def __init__(self, beams: int, text_of: Callable[[int], str]) -> None:
        self.nodes: list[TreeNode] = []
        self._beams: list[int | None] = [None] * beams
        self._text_of = text_of

    def grow(
        self,
        parents: Sequence[int],
        tokens: Sequence[int],
        scores: Sequence[float],
        *,
        ended: Sequence[int],
        beams: Sequence[int | None],
    ) -> None:
        """One step. parents (indices of beams), tokens, scores: of continuations; ended: which of them became
        answers; beams: which became the search's beams, None for one that is none."""

        def add(i: int, *, has_ended: bool) -> int:
            node = TreeNode(
                parent=self._beams[parents[i]],
                token_id=tokens[i],
                text=self._text_of(tokens[i]),
                score=scores[i],
                ended=has_ended,
            )
            self.nodes.append(node)
            return len(self.nodes) - 1

        for i in ended:
            add(i, has_ended=True)
        self._beams = [None if i is None else add(i, has_ended=False) for i in beams]

    def with_answers(self, answers: Sequence[Sequence[int]]) -> list[TreeNode]:
        """The nodes, the last one of each returned answer (its token ids) marked."""
        places = {(node.parent, node.token_id): i for i, node in enumerate(self.nodes)}
        nodes = list(self.nodes)
        for number, answer in enumerate(answers):
            place: int | None = None
            for token in answer:
                place = places.get((place, token), -1)  # a cancelled search may give back what was no beam yet
            if place is not None and place >= 0:
                nodes[place] = replace(nodes[place], return_index=number)
        return nodes


__all__ = ["SearchTree", "TreeNode"]
