"""Strict reading of text and JSON, whoever reads: problems have a reason, and a line where there is one."""

import json

import pytest

from moc_jax.reading import DocumentError, decode_text, parse_json


@pytest.mark.parametrize(
    "text", ['{"a": [1, -2.5e3, true, null, "ä"]}', "3", '"x"', "\ufeff[]", b"\xef\xbb\xbf[1]", b"{}"]
)
def test_json_is_read_as_it_is(text):
    plain = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
    assert parse_json(text) == json.loads(plain)


@pytest.mark.parametrize(
    ("text", "reason", "line"),
    [
        ("", "it is not JSON: Expecting value: line 1 column 1 (char 0)", None),
        ("{} x", "it is not JSON: Extra data", None),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' appears twice in one object; keep one", None),
        ("[NaN]", "it holds NaN, which is not JSON; give a finite number", None),
        ("9" * 65, "a number has 65 digits; the limit is 64", None),
        ("[0." + "3" * 63 + "]", "a number has 65 digits; the limit is 64", None),
        ("[" * 100_000, "it is nested too deeply", None),
        (b"[\n\n\xff]", "byte 3 (0xff) is not UTF-8; save it as UTF-8", 3),
        (b"[1,\n\0]", "it holds a NUL byte; it is not a text file", 2),
        ("[1]".encode("utf-16"), "it is UTF-16; save it as UTF-8", None),
        ("[1]".encode("utf-32-be"), "it is text in UTF-16 or UTF-32; save it as UTF-8", None),
    ],
)
def test_what_is_wrong_is_said(text, reason, line):
    with pytest.raises(DocumentError) as caught:
        parse_json(text)
    assert caught.value.reason.startswith(reason)
    assert caught.value.line == line
    assert str(caught.value) == (f"line {line}: " if line else "") + caught.value.reason


def test_depth_is_limited_where_a_limit_is_given():
    nested = '[{"a": ' * 2 + "1" + "}]" * 2
    assert parse_json(nested, deepest=4) == [{"a": [{"a": 1}]}]
    for text in (nested, "[" * 100_000):
        with pytest.raises(DocumentError, match="it nests deeper than 3 levels, which is the limit"):
            parse_json(text, deepest=3)


def test_marks_of_byte_order_are_left_out():
    assert decode_text("ä\n".encode("utf-8-sig")) == "ä\n"
