"""A checkpoint's own tokenizer, behind the interface of `mod.layout.Vocabulary`: encode, decode, and what stands around
the turns.

Turns are written in the checkpoint's own chat format where its tokenizer has the symbols of one that we know:

    ChatML   <|im_start|>user\n Where is it? <|im_end|>\n <|im_start|>assistant\n On the left. <|im_end|>\n
    Llama 3  <|start_header_id|>user<|end_header_id|>\n\n Where is it? <|eot_id|> ...

An opening is several tokens there. Its first is the decision to speak; silence is the token that ends a turn.

Elsewhere, and with symbols of the user's own, the stream needs four symbols that are single tokens: where it begins,
staying silent (which also ends a response), a user's turn, the assistant's turn. They are resolved when the tokenizer
is loaded and refused when they are not one token. Sequences are put together from lists of ids, never by joining
strings, so that training and streaming agree.
"""

from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path

from mod.config import UserError
from mod.real.llm import read_json

# Chat formats: the symbols they need, how a turn opens, the symbol that ends it, and what follows that one.
CHATS = ((("<|im_start|>", "<|im_end|>"), "<|im_start|>{}\n", "<|im_end|>", "\n"),
         (("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|start_header_id|>{}<|end_header_id|>\n\n",
          "<|eot_id|>", ""))


def parse_symbols(text: str) -> dict[str, str]:
    """ "bos=<s> eos=</s>" -> {"bos": "<s>", "eos": "</s>"}. Raises UserError for anything else."""
    pairs = [part.partition("=") for part in text.split()]
    symbols = {kind: value for kind, _, value in pairs}
    if len(symbols) < len(pairs) or not all(symbols.values()) or set(symbols) - {"bos", "eos", "user", "assistant"}:
        raise UserError(f"symbols got {text!r}, expected KIND=TEXT, once each, of the kinds bos, eos, user, assistant")
    return symbols


class TextTokenizer:
    """tokenizer.json through the `tokenizers` package.

    symbols: what stands for bos, eos (silence), user and assistant, as "eos=</s> user=User"; by default the chat
    format's, else what the files name, and the words "User" and "Assistant". A token may be named as the vocabulary
    spells it. None: no stream, only text, which needs no symbols.

    stop      every id that ends a text, which may be several
    reserved  ids that no one's words may become: the symbols of the stream, and the tokenizer's own control tokens
    """

    def __init__(self, folder: Path, symbols: str | None = ""):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(f"{folder} needs the tokenizers package; pip install tokenizers") from None
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"no file {path}; download the tokenizer as well")
        try:
            self.tokenizer = Tokenizer.from_buffer(path.read_bytes().removeprefix(BOM_UTF8))
        except Exception as error:  # the package raises nothing more precise
            raise UserError(f"{path} is damaged or no tokenizer ({error}); download it again") from error
        self._as_written()
        self.folder = folder
        added = self.tokenizer.get_added_tokens_decoder().items()
        self.reserved = {number for number, token in added if token.special} - {self._unknown()}
        named = {kind: self._named_ids(f"{kind}_token_id") for kind in ("bos", "eos")}
        self.stop = set(named["eos"])
        if symbols is None:
            return
        self.symbols = parse_symbols(symbols)
        chat = next((chat for chat in CHATS if None not in map(self.tokenizer.token_to_id, chat[0])), None)
        if chat and not self.symbols:
            self._read_chat(*chat, named["bos"])
            return
        self.bos = self._symbol("bos", named["bos"] or named["eos"])
        self.eos = self._symbol("eos", named["eos"])
        self.user = self._symbol("user", [], "User")
        self.assistant = self._symbol("assistant", [], "Assistant")
        self.reserved |= {self.bos, self.eos, self.user, self.assistant}
        if len({self.eos, self.user, self.assistant}) < 3:
            got = ", ".join(f"{kind} {getattr(self, kind)}" for kind in ("eos", "user", "assistant"))
            raise UserError(f"{folder}: got the same token twice ({got}), expected three; name others with --symbols")
        self.opening, self.closing = {"user": [self.user], "assistant": [self.assistant]}, {"user": [], "assistant": []}

    def _read_chat(self, needed: Sequence[str], opens: str, end: str, follows: str, bos: list[int]) -> None:
        """What stands around the turns of a chat format. Raises UserError where its symbols are no tokens of their own,
        or where the roles cannot be told apart."""
        self.eos, after = self.tokenizer.token_to_id(end), self._ids(follows)
        self.opening = {role: self._ids(opens.format(role)) for role in ("user", "assistant")}
        self.closing = {"user": [self.eos, *after], "assistant": after}
        self.user, self.assistant = (self.opening[role][0] for role in ("user", "assistant"))
        self.bos = (bos or [self.assistant])[0]
        self.reserved |= {self.bos, self.eos, self.user, self.assistant}
        whole = all(self._ids(symbol) == [self.tokenizer.token_to_id(symbol)] for symbol in needed)
        if not whole or self.opening["user"] == self.opening["assistant"]:
            got, expected = " ".join(map(self.tokenizer.id_to_token, self.opening["assistant"])), " and ".join(needed)
            raise UserError(f"{self.folder}: the assistant's turn would open with {got}, expected {expected} as tokens "
                            "of their own and another opening than the user's; name others with --symbols")

    def _as_written(self) -> None:
        """A text becomes all of its tokens and nothing else, the same ones each time. The file may have been saved
        with what its last training run wanted: a length to cut at, one to fill up to, merges left out by chance."""
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        if getattr(self.tokenizer.model, "dropout", None):
            self.tokenizer.model.dropout = None

    def _unknown(self) -> int | None:
        """The id of what the vocabulary lacks, which anyone may say: it is no control token."""
        name = getattr(self.tokenizer.model, "unk_token", None)
        return None if name is None else self.tokenizer.token_to_id(name)

    def _named_ids(self, key: str) -> list[int]:
        """Begin or end of text as config.json and generation_config.json give it, which may be a list; in order."""
        found: list[int] = []
        for file in ("config.json", "generation_config.json"):
            if (self.folder / file).is_file():
                value = read_json(self.folder / file).get(key)
                found += value if isinstance(value, list) else [] if value is None else [value]
        for token in found:
            if type(token) is not int or not 0 <= token < len(self):
                raise UserError(f"{self.folder}: {key} is {token!r}, expected one of {len(self)} tokens; correct it")
        return found

    def _symbol(self, kind: str, ids: list[int], default: str = "") -> int:
        """The single id of a symbol: the one asked for, else what the files name, else `default`."""
        text = self.symbols.get(kind, "" if ids else default)
        if not text:
            if not ids:
                raise UserError(f"{self.folder} names no {kind} token; name one: --symbols {kind}=TEXT")
            return ids[0]
        single = self.tokenizer.token_to_id(text)
        encoded = [single] if single is not None else self._ids(text)
        if len(encoded) != 1 or (single is None and encoded[0] == self._unknown()):
            tokens = [self.tokenizer.id_to_token(token) for token in encoded]
            message = f"the {kind} symbol {text!r} is {len(encoded)} tokens of {self.folder} ({' '.join(tokens)})"
            raise UserError(f"{message}, expected one of its own; name another: --symbols {kind}=TEXT")
        return encoded[0]

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Ids of what someone says, without symbols of any kind. Raises UserError when the words hold one: with it a
        user could end the turn and speak as the assistant."""
        ids = self._ids(text)
        if held := [token for token in ids if token in self.reserved]:
            name = self.tokenizer.id_to_token(held[0])
            raise UserError(f"got {text!r}, which holds {name!r}, a symbol of the stream or a control token, expected "
                            "plain words; reword it or name other --symbols")
        return ids

    def prompt(self, text: str) -> list[int]:
        """Ids of a text as the checkpoint was trained to begin one: with its own opening symbols, if it has any."""
        return self.tokenizer.encode(text).ids

    def typed(self, text: str) -> str:
        """What somebody typed stays as it is."""
        return text

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def continuation(self, ids: Sequence[int], new: Sequence[int]) -> str:
        """What `new` adds to the text of `ids`, its leading space included: some tokenizers drop that of any text."""
        before, whole = self.decode(ids), self.decode([*ids, *new])
        return whole.removeprefix(before) if whole.startswith(before) else self.decode(new)
