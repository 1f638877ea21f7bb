"""Claim: no input makes a reader raise anything but UserError, hang for five seconds, or take 300 MB.

hypothesis writes the inputs: whole files with bytes flipped, cut, doubled or put in, JSON whose values are
replaced by others, and texts for flags. A reader either reads, or says what is wrong by UserError, which every
command turns into one line and exit status 2. `READERS` has every format that is read anywhere; more inputs for
those whose names hold a word are drawn by

    python tests/test_parsers.py 15000 [WORD]        # a table of how many were read, how many refused
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

import equinox as eqx
import hypothesis
import jax
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

import evaluate
import lvm
import sample
import tokenize_data
import train
from benchmarks import pods
import vqgan
import weights_rule
from common import runs, weights
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


def is_read(read, *arguments) -> bool:
    """Whether `read` gives a value; False where it raises UserError and says why. Any other exception passes
    through."""
    try:
        read(*arguments)
        return True
    except UserError as error:
        assert str(error).strip() and len(str(error)) <= 4000
        return False


@pytest.fixture(autouse=True)
def little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1024 if sys.platform == "linux" else 1) < 300e6


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
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def tokenizer(files):
    return files.tokenizer


@pytest.fixture
def model(files):
    return files.model


class Files:
    """A whole file of every format, to be damaged."""

    def __init__(self, root):
        self.root, self.tokenizer, self.model, self.dataset = root, root / "vq", root / "lvm", root / "shards"
        vqgan.save(numbers(vqgan.VQGAN, TOKENIZER), self.tokenizer)
        lvm.save(numbers(lvm.LVM, MODEL), self.model)
        codes_NS = np.random.default_rng(0).integers(0, 16, (5, 32)).astype(np.uint16)
        tokenize_data.write_dataset(self.dataset, vqgan.load(self.tokenizer), ["pairs"], ((0, codes_S) for codes_S in codes_NS))
        self.picture = root / "a.png"
        Image.new("RGB", (8, 8)).save(self.picture)

    def write(self, name, content):
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return file

    def copy(self, folder, name, content):
        return copies(folder, self.root, name, content)


def copies(folder, root, name, content):
    """`folder` again, with `content` in the place of the file `name`."""
    copy = root / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return copy


BOMBS = [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"' + b"k" * 3_000_000, b"[]," * 5_000_000,
         b"\xff\xfe{", b"",
         b'{"a": ' + b"9" * 5000 + b"}", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\\ud800"}',
         b"\x00" * 100]  # fmt: skip


def test_names_of_bytes_that_are_no_text_come_back_from_json_and_other_halves_of_pairs_do_not():
    note = {"path": os.fsdecode(b"bad-\xe9.png")}
    assert weights.parse_json(weights.strict_json(note), "notes") == note
    for text in ('{"a": "\\ud800"}', '{"a": "\\udc00"}', '{"a": "\\udd00"}'):
        with pytest.raises(UserError, match="notes: no readable JSON"):
            weights.parse_json(text, "notes")


def bytes_or_json(content: bytes):
    """Damaged bytes, the same JSON with other values, any JSON, or a bomb."""
    return damaged(content) | changed(json.loads(content)) | JSON | st.sampled_from(BOMBS)


def npy(array) -> bytes:
    np.save(out := io.BytesIO(), array)
    return out.getvalue()


def header(shape, dtype) -> bytes:
    """The beginning of an .npy file that claims this shape."""
    np.lib.format.write_array_header_1_0(out := io.BytesIO(), {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


def arrays(content: bytes):
    sizes = st.tuples(st.integers(-3, 3) | st.sampled_from([10**6, 10**9, 10**13, 2**63, 10**30]), st.integers(0, 4))
    return damaged(content) | st.builds(
        lambda shape, dtype, more: header(shape, dtype) + more,
        sizes,
        st.sampled_from(["<i8", "<u2", "|O", "<f4", "|u1", "<U4", "|V8", ">i8"]),
        st.binary(max_size=64),
    )


READERS = {}


def reader(make):
    """Adds to READERS: `make(files)` -> (a strategy of inputs, what reads one)."""
    READERS[make.__name__.replace("_", " ")] = make
    return make


@reader
def config_of_a_tokenizer(files):
    content = (files.tokenizer / "config.json").read_bytes()
    return bytes_or_json(content), lambda new: vqgan.load(files.copy(files.tokenizer, "config.json", new))


DIFFUSERS = {
    "_class_name": "VQModel", "act_fn": "silu", "block_out_channels": [4, 8], "in_channels": 3, "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4,
    "layers_per_block": 1, "mid_block_add_attention": False, "norm_num_groups": 2, "norm_type": "group",
    "num_vq_embeddings": 16, "vq_embed_dim": 4, "sample_size": 8}  # fmt: skip


@reader
def config_of_diffusers(files):
    return changed(DIFFUSERS), lambda new: vqgan.load(files.copy(files.tokenizer, "config.json", new))


@reader
def weights_of_a_tokenizer(files):
    content = (files.tokenizer / "model.safetensors").read_bytes()
    return damaged(content), lambda new: vqgan.load(files.copy(files.tokenizer, "model.safetensors", new))


@reader
def checkpoint_of_a_tokenizer(files):
    tensors = {
        name: np.zeros((4,) * dims, np.float32)
        for name, dims in (
            ("encoder.down.0.block.0.conv1.weight", 4),
            ("encoder.conv_in.weight", 4),
            ("quantize.embedding.weight", 2),
            ("post_quant_conv.weight", 4),
        )
    }

    def write(shapes):
        arrays = {name: np.zeros(shape, np.float32) for name, shape in zip(tensors, shapes)}
        weights_rule.write_pickle(files.root / "last.ckpt", arrays, "state_dict")
        return files.root / "last.ckpt"

    shapes = st.lists(st.lists(st.integers(0, 5), max_size=5).map(tuple), max_size=4)
    return shapes, lambda shapes: vqgan.load(write(shapes))


@reader
def pickle_of_tensors(files):
    weights_rule.write_pickle(files.root / "last.ckpt", {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}, "state_dict")
    words = st.lists(st.sampled_from([bytes([code]) for code in range(256)]) | st.binary(max_size=9), max_size=30).map(b"".join)
    content = (files.root / "last.ckpt").read_bytes()
    return damaged(content) | words.map(lambda text: b"\x80\x02" + text), lambda new: [
        tensor.read() for tensor in weights.open_tensors(files.write("last.ckpt", new)).values()]


@reader
def config_of_a_model(files):
    content = (files.model / "config.json").read_bytes()
    return bytes_or_json(content), lambda new: lvm.load(files.copy(files.model, "config.json", new))


@reader
def weights_of_a_model(files):
    content = (files.model / "model.safetensors").read_bytes()
    return damaged(content), lambda new: lvm.load(files.copy(files.model, "model.safetensors", new))


@reader
def index_of_a_model(files):
    folder = files.root / "indexed"
    shutil.copytree(files.model, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    content = json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"}}).encode()
    return bytes_or_json(content), lambda new: lvm.load(files.copy(folder, "model.safetensors.index.json", new))


@reader
def config_of_a_run(files):
    fields = {"hidden": 8, "ffn": 8, "layers": 1, "heads": 2, "codes": 16, "specials": 4, "context": 16}
    (files.root / "run" / "checkpoints" / "1").mkdir(parents=True)
    content = json.dumps({"model": fields, "tokenizer": "0", "train": {"tokenizer": "x"}}).encode()

    def read(new):
        run = files.write("run/config.json", new).parent
        sample.find_models(str(run), None)
        lvm.load(run)

    return bytes_or_json(content), read


@reader
def settings_of_a_run(files):
    (files.root / "settings" / "checkpoints" / "1").mkdir(parents=True)
    flags = {"steps": 3, "out": "a", "mesh": "1,1"}

    def read(new):
        file = files.write("settings/train.json", new)
        runs.begin_run(file, flags, flags, {"out"})

    return bytes_or_json(json.dumps(flags).encode()), read


@reader
def log_of_a_run(files):
    lines = b"".join(json.dumps({"step": n, "loss": 1.0}).encode() + b"\n" for n in range(3))

    def read(new):
        runs.keep_log_until(files.write("log/metrics.jsonl", new), 2)
        for copy in (files.root / "log").glob("*.damaged*"):
            copy.unlink()

    return (damaged(lines) | st.lists(JSON.map(json.dumps), max_size=3).map(lambda lines: "\n".join(lines).encode()), read)


@reader
def easylm_stream(files):
    tensor = lambda *shape: msgpack.packb(msgpack.ExtType(1, msgpack.packb((shape, "float32", np.zeros(shape, np.float32).tobytes()))))
    entries = [(("params", "params", "transformer", "wte", "embedding"), tensor(20, 8)),
               (("params", "params", "transformer", "h", "0", "feed_forward", "w1", "kernel"), tensor(8, 8)), (("step",), tensor())]
    bombs = st.sampled_from([b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff"])
    return damaged(b"".join(map(msgpack.packb, entries))) | bombs, lambda new: lvm.load(files.write("stream", new))


@reader
def dataset(files):
    """A file of it is replaced, and for half of the inputs the digests say that it was written so."""
    about = json.loads((files.dataset / "dataset.json").read_text())

    def mutated(name):
        content = (files.dataset / name).read_bytes()
        inputs = arrays(content) if name.endswith(".npy") else damaged(content)
        inputs = changed(about) | bytes_or_json(content) if name.endswith(".json") else inputs
        return st.tuples(st.just(name), inputs, st.booleans())

    def read(named):
        name, new, signed = named
        copy = files.copy(files.dataset, name, new)
        if signed and name != "dataset.json":
            digest = hashlib.sha256((copy / name).read_bytes()).hexdigest()
            new = about | {"sha256": about["sha256"] | {name: digest}}
        if signed and isinstance(new, dict):
            (copy / "dataset.json").write_bytes(tokenize_data.describe(new))
        shards = tokenize_data.Shards(copy)
        for i in range(len(shards)):
            shards.row(i, (shards.codes, shards.codes + 1, shards.codes + 2))
        with contextlib.redirect_stdout(io.StringIO()):
            tokenize_data.inspect(tokenize_data.Inspect(copy))

    return st.one_of(*(mutated(file.name) for file in sorted(files.dataset.iterdir()))), read


@reader
def tokens_as_jsonl(files):
    lines = st.lists(
        st.binary(max_size=40)
        | JSON.map(lambda value: json.dumps(value).encode())
        | damaged(b'{"tokens": "AAAAAAEAAAACAAAA", "context": "AQAAAA=="}')
        | st.dictionaries(st.sampled_from(["tokens", "context"]), JSON, max_size=2).map(lambda value: json.dumps(value).encode()),
        max_size=4,
    )

    def read(new):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            file = files.write("dataset.jsonl", new)
            sentences = tokenize_data.open_sentences(file, 16, fields="[{context}],{tokens}", beside=folder)
            for i in range(len(sentences)):
                sentences.row(i, (16, 17, 18))

    return lines.map(b"\n".join), read


@reader
def chunk_of_codes(files):
    codes = [np.zeros((1, 16), np.uint16), np.zeros((2, 16), np.uint16)]
    (files.root / "chunks").mkdir()
    file = files.root / "chunks" / "000000.json"
    tokenize_data.write_chunk(file, codes, [{"path": "a", "reason": "b", "bad": True}], 1, ["a"] * 2)
    content = file.read_bytes()
    return bytes_or_json(content), lambda new: tokenize_data.read_chunk(files.write("chunks/000000.json", new), 16)


@reader
def plan_of_a_tokenisation(files):
    source = tokenize_data.Colorize(inputs=files.root, out=files.root / "planned", tokenizer=files.tokenizer)
    tokenizer = vqgan.load(files.tokenizer)
    begin = lambda: tokenize_data.begin_plan(files.root / "planned.codes", source, tokenizer, [], 8)
    begin()
    content = (files.root / "planned.codes" / "plan.json").read_bytes()
    return bytes_or_json(content), lambda new: (files.write("planned.codes/plan.json", new), begin())


@reader
def pictures_as_npy(files):
    content = npy(np.zeros((2, 8, 8, 3), np.uint8))

    def read(new):
        pictures = vqgan.Pictures(files.write("pictures.npy", new), 8, 1.0, files.root / "rejected.jsonl", 0)
        pictures.read(len(pictures.pictures) - 1, (0, 0, 0))

    return arrays(content), read


@reader
def features_as_npz(files):
    np.savez(out := io.BytesIO(), features_ND=np.zeros((3, 4), np.float32), definition="this")
    return damaged(out.getvalue()), lambda new: evaluate.read_features(files.write("features.npz", new), "this", 4)


@reader
def palette(files):
    return bytes_or_json(b"[[0, 0, 0], [255, 255, 255], [0, 128, 0]]"), lambda new: tokenize_data.read_palette(files.write("palette.json", new))


VOC = (
    b"<annotation><size><width>100</width><height>50</height></size><object><name>dog</name><bndbox>"
    b"<xmin>1</xmin><ymin>2</ymin>"
    b"<xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>"
)


@reader
def annotation_of_voc(files):
    numbers = st.sampled_from(["nan", "inf", "-1", "1e999", "", "x", "0", "99999999999", "1_0", "\u0663"])
    odd = numbers.map(lambda text: VOC.replace(b"100", text.encode()).replace(b"30", text.encode()))
    bombs = st.sampled_from(
        [b"<a>" * 100_000, b'<!DOCTYPE a [<!ENTITY b "' + b"c" * 1000 + b'">]><a>&b;</a>', b'<?xml version="1.0" encoding="klingon"?><a/>']
    )
    return damaged(VOC) | odd | bombs, lambda new: evaluate.single_object(files.write("a.xml", new))


@reader
def list_of_a_fold(files):
    return damaged(b"2007_000033__01\n2007_000042__12\n") | st.binary(max_size=40), lambda new: evaluate.read_fold(files.write("fold0.txt", new))


def prompt_lines(files):
    record = {"input": [str(files.picture)] * 3, "output": "a.png", "target": [str(files.picture)]}
    return bytes_or_json(json.dumps(record).encode())


@reader
def prompts_of_sample(files):
    def read(new):
        config = sample.Config(prompts=files.write("prompts.jsonl", new), out=files.root / "answers")
        sample.read_prompts(config, config.out)

    return prompt_lines(files), read


@reader
def prompts_of_evaluate(files):
    return prompt_lines(files), lambda new: evaluate.read_prompts(files.write("prompts.jsonl", new))


@reader
def flag_fields(files):
    words = "[ ] { } <| |> , bos eos tokens 8192 99999999999 -1".split()
    text = st.text(max_size=30) | st.lists(st.sampled_from(words), max_size=9).map("".join)
    return text, lambda text: tokenize_data.split_fields(text, (8192, 8193), 8292)


PIECES = [",", ":", "/", "x", "-1", "1", "0", "8", "9" * 20, "9" * 5000, "nan", "inf", "1e-7", " ", "\u0663", "\u00b2"]


def flag(read):
    text = st.text(max_size=20) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
    return text, read


@reader
def flag_mesh_of_train(files):
    return flag(train.parse_mesh)


@reader
def flag_mesh_of_vqgan(files):
    return flag(vqgan.make_mesh)


@reader
def flag_weight_of_data(files):
    return flag(tokenize_data.split_weight)


@reader
def flag_part(files):
    return flag(tokenize_data.split_part)


@reader
def flag_resize_output(files):
    config = sample.Config(prompts=files.picture, out=files.root)
    return flag(lambda text: sample.check_config(dataclasses.replace(config, resize_output=text)))


@reader
def flag_topology(files):
    return flag(lambda text: pods.find_topology(text))


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(few, max_examples=40)
def test_every_input_is_read_or_refused_by_user_error(files, name, data):
    is_read(reader_of(files, name)[1], data.draw(reader_of(files, name)[0]))


@functools.cache
def reader_of(files, name):
    return READERS[name](files)


@pytest.mark.parametrize(
    "name",
    [
        "config of a tokenizer",
        "config of a model",
        "index of a model",
        "config of a run",
        "settings of a run",
        "chunk of codes",
        "palette",
        "plan of a tokenisation",
        "prompts of sample",
        "prompts of evaluate",
        "tokens as jsonl",
    ],
)
def test_a_json_bomb_is_refused_within_two_seconds(files, name):
    _, read = reader_of(files, name)
    for bomb in BOMBS:
        began = time.monotonic()
        assert not is_read(read, bomb), (name, bomb[:20])
        assert time.monotonic() - began < 2, (name, bomb[:20])


def test_an_xml_entity_is_refused_before_it_is_expanded(files):
    laughs = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij"))
    file = files.write("laughs.xml", f'<!DOCTYPE x [<!ENTITY a "ha">{laughs}]><x>&j;</x>'.encode())
    with pytest.raises(UserError, match="laughs.xml: no readable XML .it declares a document type"):
        evaluate.single_object(file)
    file = files.write("file.xml", b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>')
    with pytest.raises(UserError, match="declares a document type"):
        evaluate.single_object(file)


@pytest.mark.parametrize("shape, dtype", [((10**13, 3), "<i8"), ((-5, 3), "<i8"), ((10**30, 3), "<i8"), ((2, 3), "|O"), ((1 << 60, 3), "<i8")])
def test_an_npy_header_that_claims_what_is_not_there_is_refused_by_the_file(files, shape, dtype):
    content = header(shape, dtype) + bytes(64)
    about = json.loads((files.dataset / "dataset.json").read_text())
    about["sha256"]["00000.index.npy"] = hashlib.sha256(content).hexdigest()
    copy = files.copy(files.dataset, "00000.index.npy", content)
    (copy / "dataset.json").write_bytes(tokenize_data.describe(about))
    with pytest.raises(UserError, match="00000.index.npy: (no whole .npy file|wanted int64)"):
        tokenize_data.Shards(copy)


def test_a_compressed_npz_is_refused_before_it_grows(files):
    np.savez_compressed(files.root / "zeros.npz", features_ND=np.zeros((20_000, 1000), np.float32), definition="this")
    with pytest.raises(UserError, match="zeros.npz: no whole array features_ND in it .it is compressed"):
        evaluate.read_features(files.root / "zeros.npz", "this", 1000)


@pytest.mark.parametrize(
    "field, value, wanted",
    [
        ("codes", "16", "codes must be int, got '16'"),
        ("sha256", [], "sha256 must be "),
        ("kinds", {"pairs": "5"}, "kinds must be dict"),
        ("tokens", 1.5, "tokens must be int, got 1.5"),
        ("codes", 10**6, "codes 1000000 must be in"),
        ("sentences", None, "sentences must be int"),
        ("sha256", {"../../etc/passwd": "0"}, "which is no file of a dataset"),
    ],
)
def test_a_field_of_the_wrong_type_is_named_with_its_file(files, field, value, wanted):
    about = json.loads((files.dataset / "dataset.json").read_text())
    with pytest.raises(UserError, match=rf"dataset\.json: .*{wanted}"):
        tokenize_data.Shards(files.copy(files.dataset, "dataset.json", tokenize_data.describe(about | {field: value})))


# ---------------------------------------------------------------------------------------------------- numbers of flags

NEEDED = {lvm.LVMConfig: {"hidden": 8, "ffn": 8, "layers": 1, "heads": 2}, tokenize_data.Pairs: {"answers": (Path("none"),)}}


def number_fields():
    for module in (vqgan, lvm, tokenize_data, sample, train, evaluate):
        for config in vars(module).values():
            if (
                isinstance(config, type)
                and dataclasses.is_dataclass(config)
                and config.__module__ == module.__name__
                and not issubclass(config, eqx.Module)
            ):
                for field in dataclasses.fields(config):
                    if {int, float} & {field.type, *(kind for kind in typing.get_args(field.type) if isinstance(kind, type))}:
                        yield pytest.param(config, field, id=f"{module.__name__}.{config.__name__}.{field.name}")


@pytest.mark.parametrize("config, field", list(number_fields()))
def test_a_number_that_makes_no_sense_is_refused_by_the_name_of_its_flag(config, field):
    if config is lvm.Convert:
        pytest.skip("its --heads is checked with the shapes of the stream that they belong to")
    kinds = (field.type, *typing.get_args(field.type))
    needed = {f.name: (Path("none"), Path("nothing")) if f.type == tuple[Path, ...] else Path("none")
              for f in dataclasses.fields(config) if f.default is f.default_factory is dataclasses.MISSING}  # fmt: skip
    needed |= NEEDED.get(config, {})
    config(**needed)
    for value in [-2, 2**31, 10**30] if float not in kinds else [math.nan, math.inf, -math.inf, -1.5, 1e300]:
        if (config, field.name, value) == (evaluate.Scaling, "tokens", 2**31):
            continue  # a run of so many tokens is not absurd
        with pytest.raises(UserError, match=rf"^(--)?{field.name}\b|^--{field.name.replace('_', '-')}\b"):
            config(**needed | {field.name: (value,) if isinstance(field.default, tuple) else value})


@pytest.mark.parametrize("words", [
    ["vqgan.py", "train", "--data", "none", "--ema", "1"], ["sample.py", "--temperature", "nan"],
    ["tokenize_data.py", "inpaint", "--inputs", "a", "--out", "b", "--squares", "5"]])
def test_a_command_names_the_flag_and_ends_with_status_2(words):
    done = run_script(*words)
    assert (done.returncode == 2 and words[-2] in done.stderr and words[-1] in done.stderr and "Traceback" not in done.stderr)


def run_script(*words, **environment):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=vqgan.HERE, env=os.environ | environment)


@pytest.mark.slow
def test_a_value_error_that_nobody_raised_on_purpose_keeps_its_traceback_and_status_1(files, tmp_path):
    """Pillow is broken for one process, so that `show` fails for no fault of its user."""
    words = ["tokenize_data.py", "show", "--tokenizer", files.tokenizer, "--out", tmp_path / "shown.png", "--data"]
    (tmp_path / "sitecustomize.py").write_text(
        "import PIL.Image\ndef fails(*_): raise ValueError('all the input array dimensions must "
        "match')\nPIL.Image.fromarray = fails\n"
    )
    broken = run_script(*words, files.dataset, PYTHONPATH=str(tmp_path))
    assert (broken.returncode == 1 and "Traceback" in broken.stderr and "ValueError: all the input" in broken.stderr)
    missing = run_script(*words, tmp_path / "nothing")
    assert (missing.returncode == 2 and missing.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in missing.stderr)


@pytest.mark.parametrize(
    "field, value",
    [("num_res_blocks", 10**9), ("channel_mult", [1] * 10**6), ("hidden_channels", 2**70), ("num_embeddings", 10**15)],
)
def test_a_tokenizer_of_absurd_size_is_refused(tokenizer, tmp_path, field, value):
    fields = json.loads((tokenizer / "config.json").read_text())
    with pytest.raises(UserError, match=f"config.json: {field} "):
        vqgan.load(copies(tokenizer, tmp_path, "config.json", fields | {field: value}))


def read_all(file):
    return [tensor.read() for tensor in weights.open_pickle(file).values()]


def test_a_pickle_that_asks_for_a_memo_of_gigabytes_takes_none(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02]r" + struct.pack("<I", 2**31) + b".")
    is_read(read_all, tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "field, ours",
    [
        ("num_hidden_layers", "layers"),
        ("hidden_size", "hidden"),
        ("intermediate_size", "ffn"),
        ("num_attention_heads", "heads"),
        ("vocab_size", "specials"),
        ("max_position_embeddings", "context"),
        ("codes", "codes"),
    ],
)
@pytest.mark.parametrize("value", [10**9, 2**70])
def test_a_model_of_absurd_size_is_refused_by_the_name_of_the_number(model, tmp_path, field, ours, value):
    fields = {
        key: number
        for key, number in json.loads((model / "config.json").read_text()).items()
        if key not in ("specials", "num_key_value_heads")
    }
    with pytest.raises(UserError, match=rf"config.json: {ours} must be an integer in \[\d"):
        lvm.load(copies(model, tmp_path, "config.json", fields | {field: value}))


def test_a_model_of_a_million_layers_is_refused_at_once(model, tmp_path):
    fields, began = json.loads((model / "config.json").read_text()), time.monotonic()
    with pytest.raises(UserError, match=r"config.json: layers must be an integer in \[1, 4096\], got 1000000"):
        lvm.load(copies(model, tmp_path, "config.json", fields | {"num_hidden_layers": 10**6}))
    with pytest.raises(UserError, match="holds 12 tensors; it must hold a LLaMA of 4096 layers"):
        lvm.load(copies(model, tmp_path, "config.json", fields | {"num_hidden_layers": 4096}))
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("field", ["layers", "hidden", "ffn", "heads", "codes", "specials", "context"])
def test_a_run_of_absurd_size_is_refused_by_the_name_of_the_number(tmp_path, field):
    (tmp_path / "config.json").write_text(json.dumps({"model": {**dataclasses.asdict(MODEL), field: 10**9}}))
    (tmp_path / "checkpoints" / "1" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match=f"config.json: .*{field} must be an integer in .*, got 1000000000"):
        lvm.load(tmp_path)


@pytest.mark.parametrize("flags", [["--size", "8b"], ["--size", ""], ["--mesh", "1,1"], ["--batch", "0"], ["--batch", "1e9"], ["--context", "x"], ["--data", "\n"]])
def test_a_wrong_flag_is_one_message_and_status_2(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as exit:
        train.main()
    assert exit.value.code == 2 and "Traceback" not in capsys.readouterr().err


def campaign(inputs: int, word: str, root):
    """Draws so many inputs, over all readers with `word` in their name, and prints how many were read and how
    many refused. Any other exception ends it."""
    files, total, names = Files(root), [0, 0], [name for name in READERS if word in name]
    for name in names:
        counts, began, (strategy, read) = [0, 0], time.monotonic(), reader_of(files, name)

        @given(new=strategy)
        @settings(few, max_examples=-(-inputs // len(names)), derandomize=False)
        def run(new):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                counts[is_read(read, new)] += 1

        run()
        total = [a + b for a, b in zip(total, counts)]
        print(f"{name:28} {counts[1]:>6} read {counts[0]:>6} refused {time.monotonic() - began:>6.0f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{'all':28} {total[1]:>6} read {total[0]:>6} refused; {sum(total)} inputs, no other exception; " f"peak memory {peak} MiB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        campaign(int(sys.argv[1]), *sys.argv[2:] or [""], Path(root))
