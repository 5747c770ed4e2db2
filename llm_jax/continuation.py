"""The text of one row as its tokens come: whole characters, cut at a stop string."""

from collections.abc import Sequence

from llm_jax.tokenizers import Tokenizer

UNKNOWN = "\ufffd"  # what the bytes of an unfinished character are decoded as
# Ids before new ones that are decoded with them: a character may lie across tokens, and what a tokenizer puts
# between two of them depends on both. From twice LONGEST on only those are kept.
CONTEXT, LONGEST = 8, 64


class Continuation:
    """What follows `prompt`, given back in pieces that no later token changes.

    is_text: the prompt is of whole characters; otherwise its last one may be unfinished, and is then given too.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop_strings: Sequence[str] = (), *, is_text: bool = True
    ) -> None:
        self.num_tokens = 0  # up to the one that completed a stop string
        self.is_stopped = False
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._ids = list(prompt[-CONTEXT:])
        # Of the text of _ids, how much is in _held or given.
        self._decoded = len(tokenizer.decode(self._ids) if is_text else self._complete())
        self._held = ""  # known, but it may be the beginning of a stop string

    def add(self, ids: Sequence[int]) -> str:
        """The text that is certain by now and was not given before. After a stop string nothing is added."""
        if not self._stop_strings:
            self.num_tokens += len(ids)
            return self._decode(ids)
        given = ""
        for i in ids:
            if self.is_stopped:
                break
            self.num_tokens += 1
            given += self._give(self._decode([i]))
        return given

    def finish(self) -> str:
        """What was held back, when no token follows."""
        if self.is_stopped:
            return ""
        rest = self._tokenizer.decode(self._ids)[self._decoded :]
        given = self._give(rest)
        held, self._held = self._held, ""
        return given + held

    def _complete(self) -> str:
        """The text of _ids without a last character whose bytes are not all there."""
        return self._tokenizer.decode(self._ids).removesuffix(UNKNOWN)

    def _decode(self, ids: Sequence[int]) -> str:
        self._ids += ids
        text = self._complete()
        new = text[self._decoded :]
        self._decoded = max(self._decoded, len(text))
        if len(self._ids) > LONGEST and self._tokenizer.decode(self._ids) == text:
            self._ids = self._ids[-CONTEXT:]
            self._decoded = len(self._complete())
        return new

    def _give(self, new: str) -> str:
        """All of what is held and new that no stop string can begin in; up to the first of them if there is one."""
        text = self._held + new
        found = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of the text are a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
