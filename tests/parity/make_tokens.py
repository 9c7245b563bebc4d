"""Writes what transformers' tokenizer makes of prompts: `python -m tests.parity.make_tokens`, in make_wan.py's
environment, which for this needs `pip install sentencepiece protobuf ftfy babel`, too.

A unigram model of 8 000 pieces with umT5's normaliser, special ids and bytes is trained here, on names that CLDR has
for countries, languages and moneys in ten scripts.
"""

import io
import json
import lzma
import pathlib
import tempfile
import unicodedata
from collections.abc import Iterator

import numpy as np
import sentencepiece
import tokenizers
import transformers
from babel import Locale
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

GOLDEN = pathlib.Path(__file__).parent / "golden"
SCRIPTS = "en", "ru", "el", "he", "ar", "hi", "th", "ko", "ja", "zh"
PIECES, PROMPTS = 8000, 20  # of each script
ODD = (
    "“quoted” — and so on…",
    "ﬁlm, ﬂow, Ａｂｃ１２３",
    "½ ¾ ™ ℃ № ①②③ ￥500",
    "😀🎬 👩\u200d👩\u200d👧 ❤️",
    "𠮷野家 𓀀𓀁 ᚠ",
    "schÃ¶n, l’Ã©tÃ©",
    "&amp;amp; &lt;b&gt; &quot;",
    "tab\tnew\nline  and   more ",
    "e\u0301cole n\u0303 A\u030a",
    "zero\u200bwidth\ufeff soft\u00adhyphen",
    "ｶﾞｷﾞ ﾊﾟ ㌔ ㍿",
    "ﷺ ﻻ",
    "\u3000wide\u3000space\u00a0hard",
    "İstanbul ß ŉ ǆ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 000000",
    "x=1;y=2//z {a: [b, c]} <d/>",
    "\U0001f1eb\U0001f1f7 \U0010ffff \ue000",
    "...!!!???",
    "Zoë's naïve café, façade",
    "",
)


def names(script: str) -> list[str]:
    """What CLDR calls things in a language."""
    locale = Locale.parse(script)
    tables = locale.territories, locale.languages, locale.currencies, locale.scripts
    return sorted({str(name) for table in tables for name in table.values()})


def sentences(script: str, count: int, seed: str) -> Iterator[str]:
    """Some of them, one behind another."""
    of, raw = names(script), np.random.Philox(key=sum(map(ord, script + seed))).random_raw(8 * count)
    for row in raw.reshape(count, 8) >> np.uint64(20):
        yield ", ".join(of[int(x) % len(of)] for x in row[: 2 + int(row[0]) % 6])


def trained() -> bytes:
    """The model's file."""
    corpus = [line for script in SCRIPTS for line in [*names(script), *sentences(script, 300, "corpus")]]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=out,
        vocab_size=PIECES,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        byte_fallback=True,
        character_coverage=0.998,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def fast(model: bytes, *, by_bytes: bool) -> PreTrainedTokenizerFast:
    """The same as a tokenizer.json, as transformers' converters make it."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    built = Tokenizer(models.Unigram(vocabulary, proto.trainer_spec.unk_id, by_bytes))
    built.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    built.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    built.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    built.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    with tempfile.TemporaryDirectory() as folder:
        built.save(f"{folder}/tokenizer.json")
        return PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        )


def main() -> None:
    """The model, 200 prompts, and their ids."""
    model = trained()
    prompts = []
    for script in SCRIPTS:
        for odd, text in zip(ODD, sentences(script, PROMPTS, "prompts"), strict=True):
            prompts.append(f"{unicodedata.normalize('NFD', text) if len(prompts) % 3 == 0 else text} {odd}")
    prompts[-1] = ""
    tree: dict[str, object] = {"prompts": prompts}
    for name, by_bytes in (("by_bytes", True), ("unknown", False)):
        tokenizer = fast(model, by_bytes=by_bytes)
        tree[name] = [tokenizer(prompt_clean(prompt)).input_ids for prompt in prompts]
    (GOLDEN / "spiece.model.xz").write_bytes(lzma.compress(model, preset=9 | lzma.PRESET_EXTREME))
    (GOLDEN / "prompts.json.xz").write_bytes(lzma.compress(json.dumps(tree).encode(), preset=9 | lzma.PRESET_EXTREME))
    versions = f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}"
    sizes = {name: (GOLDEN / name).stat().st_size for name in ("spiece.model.xz", "prompts.json.xz")}
    print(f"{versions}, sentencepiece {sentencepiece.__version__}: {len(model):,} bytes; {sizes}")


if __name__ == "__main__":
    main()
