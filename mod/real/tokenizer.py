"""A checkpoint's own tokenizer, behind the interface of `mod.layout.Vocabulary`: encode, decode, and four symbols.

The stream needs four symbols that are single tokens: where it begins, staying silent (which also ends a response), a
user's turn, the assistant's turn. They are resolved when the tokenizer is loaded and refused when they are not one
token. Sequences are put together from lists of ids, never by joining strings, so that training and streaming agree.
"""

from collections.abc import Sequence
from pathlib import Path

from mod.config import UserError
from mod.real.llm import read_json


def parse_symbols(text: str) -> dict[str, str]:
    """ "bos=<s> eos=</s>" -> {"bos": "<s>", "eos": "</s>"}. Raises UserError for anything else."""
    pairs = [part.partition("=") for part in text.split()]
    if any(kind not in ("bos", "eos", "user", "assistant") or not value for kind, _, value in pairs):
        raise UserError(f"symbols got {text!r}, expected KIND=TEXT with the kinds bos, eos, user, assistant")
    return {kind: value for kind, _, value in pairs}


class TextTokenizer:
    """tokenizer.json through the `tokenizers` package.

    symbols: what stands for bos, eos (silence), user and assistant, as "eos=</s> user=User"; by default what the
    checkpoint's files name, and the words "User" and "Assistant". A token may be named as the vocabulary spells it.
    `stop` holds every id that ends a text, which may be several.
    """

    def __init__(self, folder: Path, symbols: str = ""):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(f"{folder} needs the tokenizers package; pip install tokenizers") from None
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"no file {path}; download the tokenizer as well")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more precise
            raise UserError(f"{path} is damaged or no tokenizer ({error}); download it again") from error
        self.folder, self.symbols = folder, parse_symbols(symbols)
        named = self._named_ids()
        self.stop: set[int] = named["eos"]
        self.bos = self._symbol("bos", named["bos"] or named["eos"])
        self.eos = self._symbol("eos", named["eos"])
        self.user = self._symbol("user", set(), "User")
        self.assistant = self._symbol("assistant", set(), "Assistant")

    def _named_ids(self) -> dict[str, set[int]]:
        """Begin and end of text as config.json and generation_config.json give them; an end may be a list."""
        found: dict[str, set[int]] = {"bos": set(), "eos": set()}
        for file in ("config.json", "generation_config.json"):
            if (self.folder / file).is_file():
                parts = read_json(self.folder / file)
                for kind in found:
                    value = parts.get(f"{kind}_token_id")
                    found[kind] |= set(value if isinstance(value, list) else [] if value is None else [value])
        return found

    def _symbol(self, kind: str, ids: set[int], default: str = "") -> int:
        """The single id of a symbol: the one asked for, else what the files name, else `default`."""
        text = self.symbols.get(kind, "" if ids else default)
        if not text:
            if not ids:
                raise UserError(f"{self.folder} names no {kind} token; name one: --symbols {kind}=TEXT")
            return min(ids)
        single = self.tokenizer.token_to_id(text)
        encoded = [single] if single is not None else self.encode(text)
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        if len(encoded) != 1 or (single is None and self.tokenizer.id_to_token(encoded[0]) == unknown):
            tokens = [self.tokenizer.id_to_token(token) for token in encoded]
            message = f"the {kind} symbol {text!r} is {len(encoded)} tokens of {self.folder} ({' '.join(tokens)})"
            raise UserError(f"{message}, expected one of its own; name another: --symbols {kind}=TEXT")
        return encoded[0]

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone, without symbols of any kind."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, text: str) -> list[int]:
        """Ids of a text as the checkpoint was trained to begin one: with its own opening symbols, if it has any."""
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))
