"""Claim: no input makes a reader show a traceback, hang for five seconds, or take 500 MB.

hypothesis writes the inputs: whole files with bytes flipped, cut, doubled or put in, JSON whose values are replaced by
others, and texts for flags. A reader either reads, or says what is wrong by ValueError or OSError, which every command
turns into one line and exit status 2.
"""

import dataclasses
import json
import resource
import shutil
import struct
import sys
import time

import equinox as eqx
import hypothesis
import jax
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import lvm
import tokenize_data
import train
import vqgan
from common import weights
from common.images import UserError


MODEL = lvm.LVMConfig(hidden=8, ffn=8, layers=1, heads=2, codes=16, specials=4, context=16)
TOKENIZER = vqgan.VQGANConfig(resolution=8, hidden_channels=4, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), no_attn_mid_block=True,
                              z_channels=4, num_embeddings=16, quantized_embed_dim=4, norm_groups=2)
JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=8) | st.sampled_from(["../x", "\0", "1"]),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6)
few = settings(max_examples=60, deadline=5000, derandomize=True, database=None,
               suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow])


def numbers(make, config):
    """A network of zeros, without compiling the drawing of random ones."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), eqx.filter_eval_shape(make, config, key=jax.random.key(0)))


def reads_or_says_what_is_wrong(read, *arguments):
    try:
        read(*arguments)
    except (ValueError, OSError) as error:
        assert str(error), f"{error!r} says nothing"


@pytest.fixture(autouse=True)
def little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1024 if sys.platform == "linux" else 1) < 500e6


@st.composite
def damaged(draw, content: bytes):
    """`content` after one to four accidents, of which half happen in its first 200 bytes, where headers are."""
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(200, len(content))) | st.integers(0, len(content)))
        accident, length = draw(st.sampled_from(["flip", "cut", "drop", "double", "insert"])), draw(st.integers(1, 16))
        middle = {"flip": bytes(b ^ draw(st.integers(1, 255)) for b in content[place:place + 1]) + content[place + 1:place + length], "cut": None,
                  "drop": b"", "double": 2 * content[place:place + length], "insert": draw(st.binary(max_size=16)) + content[place:place + length]}[accident]
        content = content[:place] + (b"" if middle is None else middle + content[place + length:])
    return content


@st.composite
def changed(draw, value):
    """The JSON `value` with one to three of its entries, at any depth, replaced, dropped or joined by a stranger."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        inside = value
        while True:
            keys = sorted(inside) if isinstance(inside, dict) else list(range(len(inside)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(inside[key], (dict, list)) and inside[key] and draw(st.booleans()):
                inside = inside[key]
                continue
            if draw(st.integers(0, 9)) == 0:
                del inside[key]
            else:
                inside[key] = draw(JSON)
            break
    return value


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "vq"
    vqgan.save(numbers(vqgan.VQGAN, TOKENIZER), folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "lvm"
    lvm.save(numbers(lvm.LVM, MODEL), folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("data") / "shards"
    codes_NS = np.random.default_rng(0).integers(0, 16, (5, 32)).astype(np.uint16)
    tokenize_data.write_dataset(folder, vqgan.load(tokenizer), ["pairs"], ((0, codes_S) for codes_S in codes_NS))
    return folder


def copies(folder, tmp_path, name, content):
    """`folder` again, with `content` in the place of the file `name`."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return copy


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@given(data=st.data())
@few
def test_a_damaged_tokenizer_is_refused_or_read(tokenizer, tmp_path, name, data):
    content = data.draw(damaged((tokenizer / name).read_bytes()))
    reads_or_says_what_is_wrong(vqgan.load, copies(tokenizer, tmp_path, name, content))


@given(data=st.data())
@settings(few, max_examples=30)
def test_a_tokenizer_config_of_other_values_is_refused_or_read(tokenizer, tmp_path, data):
    fields = data.draw(changed(json.loads((tokenizer / "config.json").read_text())))
    reads_or_says_what_is_wrong(vqgan.load, copies(tokenizer, tmp_path, "config.json", fields))


@pytest.mark.parametrize("field, value", [("num_res_blocks", 10**9), ("channel_mult", [1] * 10**6), ("hidden_channels", 2**70), ("num_embeddings", 10**15)])
def test_a_tokenizer_of_absurd_size_is_refused(tokenizer, tmp_path, field, value):
    fields = json.loads((tokenizer / "config.json").read_text())
    with pytest.raises(UserError, match=f"config.json: {field} "):
        vqgan.load(copies(tokenizer, tmp_path, "config.json", fields | {field: value}))


def read_all(file):
    return [tensor.read() for tensor in weights.open_pickle(file).values()]


@given(data=st.data())
@few
def test_a_damaged_pickle_is_refused_or_read(tokenizer, tmp_path, data):
    file = tmp_path / "last.ckpt"
    weights.write_pickle(file, {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}, "state_dict")
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    reads_or_says_what_is_wrong(read_all, file)


@given(words=st.lists(st.sampled_from([bytes([code]) for code in range(256)]) | st.binary(max_size=9), max_size=30).map(b"".join))
@few
def test_no_program_of_the_pickle_machine_does_anything(tmp_path, words):
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02" + words)
    reads_or_says_what_is_wrong(read_all, tmp_path / "weights.pt")


def test_a_pickle_that_asks_for_a_memo_of_gigabytes_takes_none(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02]r" + struct.pack("<I", 2**31) + b".")
    reads_or_says_what_is_wrong(read_all, tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@given(data=st.data())
@few
def test_a_damaged_model_is_refused_or_read(model, tmp_path, name, data):
    content = data.draw(damaged((model / name).read_bytes()))
    reads_or_says_what_is_wrong(lvm.load, copies(model, tmp_path, name, content))


@given(data=st.data())
@few
def test_a_model_config_of_other_values_is_refused_or_read(model, tmp_path, data):
    fields = data.draw(changed(json.loads((model / "config.json").read_text())))
    reads_or_says_what_is_wrong(lvm.load, copies(model, tmp_path, "config.json", fields))


@pytest.mark.parametrize("field, ours", [
    ("num_hidden_layers", "layers"), ("hidden_size", "hidden"), ("intermediate_size", "ffn"), ("num_attention_heads", "heads"),
    ("vocab_size", "specials"), ("max_position_embeddings", "context"), ("codes", "codes")])
@pytest.mark.parametrize("value", [10**9, 2**70])
def test_a_model_of_absurd_size_is_refused_by_the_name_of_the_number(model, tmp_path, field, ours, value):
    fields = {key: number for key, number in json.loads((model / "config.json").read_text()).items() if key not in ("specials", "num_key_value_heads")}
    with pytest.raises(UserError, match=rf"config.json: {ours} is \d+; it must be a whole number from \d to "):
        lvm.load(copies(model, tmp_path, "config.json", fields | {field: value}))


def test_a_model_of_a_million_layers_is_refused_at_once(model, tmp_path):
    fields, began = json.loads((model / "config.json").read_text()), time.monotonic()
    with pytest.raises(UserError, match="config.json: layers is 1000000; it must be a whole number from 1 to 4,096"):
        lvm.load(copies(model, tmp_path, "config.json", fields | {"num_hidden_layers": 10**6}))
    with pytest.raises(UserError, match="holds 12 tensors; it must hold a LLaMA of 4096 layers"):
        lvm.load(copies(model, tmp_path, "config.json", fields | {"num_hidden_layers": 4096}))
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("field", ["layers", "hidden", "ffn", "heads", "codes", "specials", "context"])
def test_a_run_of_absurd_size_is_refused_by_the_name_of_the_number(tmp_path, field):
    (tmp_path / "config.json").write_text(json.dumps({"model": {**dataclasses.asdict(MODEL), field: 10**9}}))
    (tmp_path / "checkpoints" / "1" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match=f"config.json: .*{field} is 1000000000; it must be a whole number"):
        lvm.load(tmp_path)


@given(data=st.data())
@few
def test_a_run_config_of_other_values_is_refused(tmp_path, data):
    fields = {"hidden": 8, "ffn": 8, "layers": 1, "heads": 2, "codes": 16, "specials": 4, "context": 16}
    (tmp_path / "config.json").write_text(json.dumps(data.draw(changed({"model": fields, "tokenizer": "0", "train": {}}))))
    reads_or_says_what_is_wrong(lvm.load, tmp_path)


@given(data=st.data())
@few
def test_a_damaged_easylm_stream_is_refused_or_read(tmp_path, data):
    tensor = lambda *shape: msgpack.packb(msgpack.ExtType(1, msgpack.packb((shape, "float32", np.zeros(shape, np.float32).tobytes()))))
    entries = [(("params", "params", "transformer", "wte", "embedding"), tensor(20, 8)),
               (("params", "params", "transformer", "h", "0", "feed_forward", "w1", "kernel"), tensor(8, 8)), (("step",), tensor())]
    (tmp_path / "stream").write_bytes(data.draw(damaged(b"".join(map(msgpack.packb, entries)))))
    reads_or_says_what_is_wrong(lvm.load, tmp_path / "stream")


@given(data=st.data())
@few
def test_a_damaged_shard_is_refused_or_read(dataset, tmp_path, data):
    name = data.draw(st.sampled_from(sorted(file.name for file in dataset.iterdir())))
    content = data.draw(changed(json.loads((dataset / name).read_text())) if name.endswith(".json") and data.draw(st.booleans())
                        else damaged((dataset / name).read_bytes()))
    copy = copies(dataset, tmp_path, name, content)

    def read():
        shards = tokenize_data.Shards(copy)
        for i in range(len(shards)):
            shards.row(i, (shards.codes, shards.codes + 1, shards.codes + 2))

    reads_or_says_what_is_wrong(read)


@given(lines=st.lists(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()) |
                      st.dictionaries(st.sampled_from(["tokens", "context"]), JSON, max_size=2).map(lambda value: json.dumps(value).encode()) |
                      damaged(b'{"tokens": "AAAAAAEAAAACAAAA"}'), max_size=4))
@few
def test_any_lines_are_refused_or_read(tmp_path, lines):
    (tmp_path / "dataset.jsonl").write_bytes(b"\n".join(lines))

    def read():
        sentences = tokenize_data.Jsonl(tmp_path / "dataset.jsonl", 16, (16, 17, 18), max_rejected=1.0)
        for i in range(len(sentences)):
            sentences.row(i, (16, 17, 18))

    reads_or_says_what_is_wrong(read)


@given(text=st.text(max_size=30) | st.lists(st.sampled_from("[ ] { } <| |> , bos eos tokens 8192 99999999999 -1".split()), max_size=9).map("".join))
@few
def test_any_fields_are_refused_or_read(text):
    reads_or_says_what_is_wrong(tokenize_data.split_fields, text, (8192, 8193), 8292)


@pytest.mark.parametrize("read", [lambda text: train.make_mesh(train.Config(mesh=text)), vqgan.make_mesh, tokenize_data.split_weight, tokenize_data.split_part],
                         ids=["mesh", "mesh of vqgan.py", "weight", "part"])
@given(text=st.text(max_size=20) | st.lists(st.sampled_from([",", ":", "/", "-1", "1", "0", "8", "99999999999999999999", "nan", "inf", " "]), max_size=8).map("".join))
@few
def test_any_text_of_a_flag_is_refused_or_read(read, text):
    reads_or_says_what_is_wrong(read, text)


@pytest.mark.parametrize("flags", [["--size", "8b"], ["--size", ""], ["--mesh", "1,1"], ["--batch", "0"], ["--batch", "1e9"], ["--context", "x"], ["--data", "\n"]])
def test_a_wrong_flag_is_one_message_and_status_2(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as exit:
        train.main()
    assert exit.value.code == 2 and "Traceback" not in capsys.readouterr().err
