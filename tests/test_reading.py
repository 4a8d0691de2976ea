"""Files that people write: a byte-order mark is no text, a key counts once, nesting has an end."""

import json

import pytest
from calibration_cases import made
from tiny import tiny_llama

import vps
from vps import Calibration, VPSConfig
from vps.fitting import Example, read_examples
from vps.reading import parse_json, parse_yaml, read_text, read_values
from vps.serving import limits

DEEP = "[" * 100_000


def marked(path, text):
    """A file as editors on Windows write it: with a mark, and two signs at the end of a line."""
    path.write_bytes(("\ufeff" + text).replace("\n", "\r\n").encode())
    return path


def test_files_of_settings(tmp_path, monkeypatch):
    """:func:`vps.load`, :meth:`Calibration.load` and VPS_CONFIG read with one reader."""
    model = tiny_llama()
    vps.policy_state(model).set_entropy(1.5)
    vps.save(model, tmp_path / "s.json")
    settings = (tmp_path / "s.json").read_text()
    made(model).save(tmp_path / "c.json")
    calibration = Calibration.load(tmp_path / "c.json")
    written = (tmp_path / "c.json").read_text()

    fresh = tiny_llama()
    vps.load(fresh, marked(tmp_path / "s.json", settings))
    assert vps.policy_state(fresh).entropy == 1.5
    assert Calibration.load(marked(tmp_path / "c.json", written)) == calibration
    assert Calibration.from_json("\ufeff" + written) == calibration
    assert VPSConfig.from_json("\ufeff" + VPSConfig(rank=3).to_json()) == VPSConfig(rank=3)
    monkeypatch.setenv("VPS_CONFIG", str(marked(tmp_path / "v.json", '{"rank":\n 3}')))
    assert limits.config_from_environment() == VPSConfig(rank=3)

    bad = {
        "the key 'format' comes twice": '{"format": 1, "format": 2}',
        "not valid JSON: nested too deeply": DEEP,
        "not UTF-8 text, at byte 1": b"{\xff}",
    }
    for message, text in bad.items():
        path = tmp_path / "bad.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv("VPS_CONFIG", str(path))
        for read in (
            lambda path: vps.load(fresh, path), Calibration.load,
            lambda path: limits.config_from_environment(),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message) as caught:
                read(path)
            assert "bad.json" in str(caught.value) and len(str(caught.value)) < 300


def test_rows(tmp_path):
    path = marked(tmp_path / "x.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    assert read_examples(path) == [Example(None, "a"), Example(None, "b")]
    path.write_bytes(b'\xef\xbb\xbf\n{"text": "a"}\n\xe9\n')
    with pytest.raises(ValueError, match="line 3: not UTF-8 text, at byte 0 of the line"):
        read_examples(path)


def test_json_or_yaml(tmp_path):
    for name, text in (
        ("a.json", '{"a": [1e-3, null]}'), ("a.yaml", "a: [0.001, null]"), ("a", "a: [0.001, ~]"),
        ("b.yaml", '{"a": [1e-3, null]}'), ("b", '{"a":\n[1e-3, null]}'),
    ):  # fmt: skip
        assert read_values(marked(tmp_path / name, text)) == {"a": [0.001, None]}
    (tmp_path / "c.json").write_text("a: 1")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_values(tmp_path / "c.json")
    assert read_text(marked(tmp_path / "t.txt", "é\nß")) == "é\nß"


@pytest.mark.parametrize(
    "parse", [parse_json, parse_yaml, VPSConfig.from_json, Calibration.from_json]
)
def test_what_is_refused(parse):
    for text, message in (
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' comes twice"),
        (DEEP, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("{", "not valid"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(text)
    if parse in (parse_json, parse_yaml):
        assert parse('\ufeff{"a": [1, {"a": 2}]}') == {"a": [1, {"a": 2}]}


def test_without_pyyaml(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "a.yaml").write_text(json.dumps({"a": 1}))
    assert read_values(tmp_path / "a.yaml") == {"a": 1}
    (tmp_path / "a.yaml").write_text("a: 1")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vps-kernels\[eval\]'"):
        read_values(tmp_path / "a.yaml")
