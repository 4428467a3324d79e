"""Tokenizers of the toy checkpoint: the structure of Llama 3's and CLIP's, with a vocabulary of a few hundred words.

The split pattern and the special tokens are those of the released tokenizers. The templates of the engine therefore
have as many tokens as with the released tokenizers, and the same crop and limits apply.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hv_batch.architecture import CLIP_TOKENS
from hv_batch.engine.text_encoders import IMAGE_TEMPLATE, VIDEO_TEMPLATE

BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<pad>"
LLAMA_SPECIALS = (BEGIN, END, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", PAD)
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"

# Llama 3's pieces: contractions, words with the preceding character, up to three digits, punctuation, newlines, spaces.
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# Words of ordinary prompts, so that a prompt has about one token per word, as with the real vocabulary. All other words
# are encoded as bytes.
WORDS = """
a about above across after against all along among an and another are around as at away back be before behind below
beneath beside between big both bright but by can close dark day deep down during each early empty end every far fast
few first for four from front full gentle giant golden great green half has have he her high his huge in inside into is
it its large last late leaving left light like little long looking low many middle more morning most moving near new
next night no not of off old on one only open or other out over own past quiet right rough round same second she short
side silent slow slowly small soft some still strong tall that the their them then there these they thin this three
through tiny to together toward two under until up upon very warm was wet while white wide wild wind with without woman
world young
red orange yellow blue purple pink black grey gray brown silver gold crimson teal turquoise violet amber colorful pale
vivid neon glowing shining shiny sparkling dusty misty foggy rainy snowy sunny stormy cloudy calm frozen burning ancient
modern rusty wooden stone glass metal paper silk
air animal apple autumn avenue baby balloon beach bear bee bench bicycle bird boat book bottle boy branch bread bridge
bubble building bus butterfly cafe cake candle car castle cat chair child city clock cloud coast coffee corner crowd cup
dancer dawn deer desert dog dolphin door dragon dragonfly dress drop dune dusk eagle earth elephant eye face fall farm
feather field fire fireworks fish flame floor flower fog food forest fountain fox frog fruit garden girl glacier grass
hair hand hat heart hill horse house ice insect island jellyfish kitchen kite lake lamp lantern leaf leaves lightning
lion machine man market meadow mirror mist monkey moon mountain mouse museum night ocean owl painting panda park path
people person petal piano planet plant pond portrait rabbit rain rainbow reef river road robot rock roof room rose
sail sand sea shadow ship shore sky smoke snow space spring square stage star stage steam storm stream street summer
sun sunflower sunlight sunrise sunset surface sword table tea temple tiger toy track train tree truck tulip umbrella
valley village violin volcano wall water waterfall wave waves whale wheel window wing winter wolf wood yard
blooming blowing breaking burns crossing crashing cutting dancing dances dives drifting drifts drinking driving dripping
falling falls floating floats flowing flies flying grazing grows hanging holding hopping jumping jumps landing leaps
melting opening passing playing plays pouring raining reading rides riding rises rising rolling rolls running runs
sailing singing sits sitting skating sleeping sleeps smiling spinning spins splashing standing stands surfing swaying
swimming swims swirling turning turns walking walks watching waving
aerial angle animation background blurred camera cinematic clear closeup detail detailed documentary dramatic drone
exposure film focus footage frame handheld hyperlapse lens lapse lighting macro motion pan photo photorealistic portrait
realistic scene shallow shot slowmotion style texture time timelapse tracking tripod view watercolor zoom
aerial bad composition deformation distortion eyes hands limbs low overexposed poor quality teeth
"""

# Words of the captions of the toy world that WORDS lacks.
CAPTION_WORDS = """
backdrop big bottom circle disc does dot downward drifts five front glides image little medium move moves pans plain
picture pointed rests sinks stands stripes striped tiny top triangle upward video
"""


def write_llama_tokenizer(directory: Path, words: Iterable[str] = WORDS.split()) -> int:
    """Write a Llama-3-like tokenizer for `AutoTokenizer`. Returns the vocabulary size, including special tokens."""
    pieces = [*_template_pieces(), *_cases(words)]
    vocabulary = _number([*_byte_letters(), *map(_in_byte_letters, pieces)])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(LLAMA_SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "padding_side": "right",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    _write(directory, tokenizer, settings)
    return tokenizer.get_vocab_size()


def write_clip_tokenizer(directory: Path, words: Sequence[str] = ()) -> tuple[int, int, int]:
    """Write a CLIP-like tokenizer. Returns (vocabulary size, start id, end id).

    Each of `words` is one token; all other text is encoded as bytes.
    """
    letters = list(_byte_letters())
    merges = _merges(words)
    merged = ["".join(pair) for pair in merges]
    # The end token must be last, as in CLIP: older versions of transformers pool at the highest id.
    vocabulary = _number([*letters, *(f"{letter}</w>" for letter in letters), *merged, CLIP_START, CLIP_END])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=CLIP_END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([CLIP_START, CLIP_END])
    start, end = vocabulary[CLIP_START], vocabulary[CLIP_END]
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_END, end), (CLIP_START, start), trim_offsets=False, add_prefix_space=False
    )
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": CLIP_START,
        "eos_token": CLIP_END,
        "unk_token": CLIP_END,
        "pad_token": CLIP_END,
        "model_max_length": CLIP_TOKENS,
    }
    _write(directory, tokenizer, settings)
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(vocabulary), start, end


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the merges, in order, with which byte pair encoding encodes each of the words as one token."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(vocab_size=2**16, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(sorted(set(map(str.lower, words))), trainer)
    return [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]


def _write(directory: Path, tokenizer: Tokenizer, settings: dict[str, object]) -> None:
    """Write the files that transformers reads. Its own writer is not used, because its output varies by version."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _byte_letters() -> Iterator[str]:
    """Yield the printable character of each byte from 0 to 255, as in the byte-level BPE of GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    for byte in range(0x100):
        yield chr(byte if byte in printable else next(spare))


def _in_byte_letters(word: str) -> str:
    letters = list(_byte_letters())
    return "".join(letters[byte] for byte in word.encode())


def _template_pieces() -> Iterator[str]:
    """Yield every piece into which the split pattern splits the templates."""
    split = pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated")
    for template in (VIDEO_TEMPLATE, IMAGE_TEMPLATE):
        text = template.head
        for special in LLAMA_SPECIALS:
            text = text.replace(special, "\0")
        for part in filter(None, text.split("\0")):
            yield from (piece for piece, _ in split.pre_tokenize_str(part))


def _cases(words: Iterable[str]) -> Iterator[str]:
    """Yield each word in lower case and capitalized, with and without a preceding space."""
    for word in words:
        yield from (word, f" {word}", word.capitalize(), f" {word.capitalize()}")


def _number(tokens: Iterable[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}
