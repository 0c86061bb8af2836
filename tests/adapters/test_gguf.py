"""`GGUFFile`: every storage type against arithmetic written out here, and files that lie about themselves."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from http_tools import slowness

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.gguf_file import TENSOR_TYPES, GGUFFile
from microvllm.runtime.options.find_model import DEMO_MODEL, find_model

U32, U64, F32, STRING, ARRAY = 4, 10, 6, 8, 9


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, type_id: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_id) + value


def array(key: str, type_id: int, count: int, values: bytes) -> bytes:
    return entry(key, ARRAY, struct.pack("<IQ", type_id, count) + values)


def info(name: str | bytes, shape: tuple[int, ...], type_id: int = 0, offset: int = 0) -> bytes:
    """One tensor info; `shape` with the fastest dimension first, as the format has it."""
    lengths = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + lengths + struct.pack("<IQ", type_id, offset)


ARCHITECTURE = entry("general.architecture", STRING, string("llama"))


def build(
    path: Path,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    entries: tuple[bytes, ...] = (ARCHITECTURE,),
    infos: tuple[bytes, ...] = (),
    data: bytes = b"",
    num_entries: int | None = None,
    num_tensors: int | None = None,
) -> Path:
    header = magic + struct.pack(
        "<IQQ",
        version,
        len(infos) if num_tensors is None else num_tensors,
        len(entries) if num_entries is None else num_entries,
    )
    header += b"".join(entries) + b"".join(infos)
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


def problem(path: Path) -> str:
    started = time.monotonic()
    with pytest.raises(ModelFileError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400
    assert time.monotonic() - started < 10
    return message


# One block of each type, decoded element by element from the layout comments of ggml-common.h.


def half(raw: npt.NDArray[np.uint8], at: int) -> float:
    return float(raw[at : at + 2].view("<f2")[0])


def nibbles(raw: npt.NDArray[np.uint8]) -> list[int]:
    return [int(byte) & 15 for byte in raw] + [int(byte) >> 4 for byte in raw]


def q4_0(raw: npt.NDArray[np.uint8]) -> list[float]:
    return [half(raw, 0) * (q - 8) for q in nibbles(raw[2:])]


def q4_1(raw: npt.NDArray[np.uint8]) -> list[float]:
    return [half(raw, 0) * q + half(raw, 2) for q in nibbles(raw[4:])]


def fifth_bits(raw: npt.NDArray[np.uint8]) -> list[int]:
    bits = int(raw.view("<u4")[0])
    return [(bits >> i & 1) << 4 for i in range(32)]


def q5_0(raw: npt.NDArray[np.uint8]) -> list[float]:
    pairs = zip(nibbles(raw[6:]), fifth_bits(raw[2:6].copy()), strict=True)
    return [half(raw, 0) * ((q | high) - 16) for q, high in pairs]


def q5_1(raw: npt.NDArray[np.uint8]) -> list[float]:
    pairs = zip(nibbles(raw[8:]), fifth_bits(raw[4:8].copy()), strict=True)
    return [half(raw, 0) * (q | high) + half(raw, 2) for q, high in pairs]


def q8_0(raw: npt.NDArray[np.uint8]) -> list[float]:
    return [half(raw, 0) * int(q) for q in raw[2:].view("i1")]


def q2_k(raw: npt.NDArray[np.uint8]) -> list[float]:
    scales, quants, d, low = raw[:16], raw[16:80], half(raw, 80), half(raw, 82)
    values = []
    for i in range(256):
        scale = int(scales[i // 16])
        q = int(quants[i // 128 * 32 + i % 32]) >> (2 * (i // 32 % 4)) & 3
        values.append(d * (scale & 15) * q - low * (scale >> 4))
    return values


def q3_k(raw: npt.NDArray[np.uint8]) -> list[float]:
    mask, quants, packed, d = raw[:32], raw[32:96], raw[96:108], half(raw, 108)
    values = []
    for i in range(256):
        group = i // 16
        low = int(packed[group % 8]) >> (4 * (group // 8)) & 15
        high = int(packed[8 + group % 4]) >> (2 * (group // 4)) & 3
        q = int(quants[i // 128 * 32 + i % 32]) >> (2 * (i // 32 % 4)) & 3
        q -= 0 if int(mask[i % 32]) >> (i // 32) & 1 else 4
        values.append(d * ((low | high << 4) - 32) * q)
    return values


def scale_and_min(packed: npt.NDArray[np.uint8], group: int) -> tuple[int, int]:
    """The 6-bit scale and minimum of one of 8 groups, as Q4_K and Q5_K pack them into 12 bytes."""
    p = [int(byte) for byte in packed]
    if group < 4:
        return p[group] & 63, p[group + 4] & 63
    return p[group + 4] & 15 | p[group - 4] >> 6 << 4, p[group + 4] >> 4 | p[group] >> 6 << 4


def q4_k(raw: npt.NDArray[np.uint8]) -> list[float]:
    values = []
    for i in range(256):
        scale, low = scale_and_min(raw[4:16], i // 32)
        q = int(raw[16 + i // 64 * 32 + i % 32]) >> (4 * (i // 32 % 2)) & 15
        values.append(half(raw, 0) * scale * q - half(raw, 2) * low)
    return values


def q5_k(raw: npt.NDArray[np.uint8]) -> list[float]:
    values = []
    for i in range(256):
        scale, low = scale_and_min(raw[4:16], i // 32)
        q = int(raw[48 + i // 64 * 32 + i % 32]) >> (4 * (i // 32 % 2)) & 15
        q |= (int(raw[16 + i % 32]) >> (i // 32) & 1) << 4
        values.append(half(raw, 0) * scale * q - half(raw, 2) * low)
    return values


def q6_k(raw: npt.NDArray[np.uint8]) -> list[float]:
    values = []
    for i in range(256):
        part, row, column = i // 128, i // 32 % 4, i % 32
        q = int(raw[part * 64 + (row % 2) * 32 + column]) >> (4 * (row // 2)) & 15
        q |= (int(raw[128 + part * 32 + column]) >> (2 * row) & 3) << 4
        scale = int(raw[192:208].view("i1")[i // 16])
        values.append(half(raw, 208) * scale * (q - 32))
    return values


IQ4_QUANTS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def iq4_nl(raw: npt.NDArray[np.uint8]) -> list[float]:
    quants = [int(byte) & 15 for byte in raw[2:]] + [int(byte) >> 4 for byte in raw[2:]]
    return [half(raw, 0) * IQ4_QUANTS[q] for q in quants]


def iq4_xs(raw: npt.NDArray[np.uint8]) -> list[float]:
    high, low, d = int(raw[2:4].view("<u2")[0]), raw[4:8], half(raw, 0)
    values = []
    for i in range(256):
        group = i // 32
        scale = int(low[group // 2]) >> (4 * (group % 2)) & 15 | (high >> (2 * group) & 3) << 4
        q = int(raw[8 + group * 16 + i % 16]) >> (4 * (i // 16 % 2)) & 15
        values.append(d * (scale - 32) * IQ4_QUANTS[q])
    return values


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(raw: npt.NDArray[np.uint8]) -> list[float]:
    codes = [int(byte) & 15 for byte in raw[1:]] + [int(byte) >> 4 for byte in raw[1:]]
    return [2.0 ** (int(raw[0]) - 127) * E2M1[code & 7] * (-1 if code & 8 else 1) for code in codes]


Decoder = Callable[[npt.NDArray[np.uint8]], list[float]]
DECODERS: dict[str, tuple[Decoder, tuple[int, ...]]] = {  # and where the float16 scales lie in a block
    "Q4_0": (q4_0, (0,)),
    "Q4_1": (q4_1, (0, 2)),
    "Q5_0": (q5_0, (0,)),
    "Q5_1": (q5_1, (0, 2)),
    "Q8_0": (q8_0, (0,)),
    "Q2_K": (q2_k, (80, 82)),
    "Q3_K": (q3_k, (108,)),
    "Q4_K": (q4_k, (0, 2)),
    "Q5_K": (q5_k, (0, 2)),
    "Q6_K": (q6_k, (208,)),
    "IQ4_NL": (iq4_nl, (0,)),
    "IQ4_XS": (iq4_xs, (0,)),
    "MXFP4": (mxfp4, ()),
}


@pytest.mark.parametrize("name", DECODERS)
def test_quantised_types(tmp_path: Path, name: str) -> None:
    decode, scales = DECODERS[name]
    type_id, block, block_bytes = next((i, b, n) for i, (t, b, n) in TENSOR_TYPES.items() if t == name)
    rows, blocks_in_row = 5, 2
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, (rows * blocks_in_row, block_bytes), dtype=np.uint8)
    for at in scales:
        values = rng.uniform(-2, 2, len(raw)).astype("<f2")
        raw[:, at : at + 2] = values[:, None].view(np.uint8)
    shape = (block * blocks_in_row, rows)
    path = build(tmp_path / "m.gguf", infos=(info("w", shape, type_id),), data=raw.tobytes())
    file = GGUFFile(path)
    expected = np.array([decode(one) for one in raw], dtype=np.float32).reshape(rows, -1)
    assert file.tensors["w"].shape == (rows, block * blocks_in_row)
    np.testing.assert_allclose(file.tensor("w"), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(file.rows("w", 1, 3), file.tensor("w")[1:3])


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_types(tmp_path: Path, name: str) -> None:
    values = np.random.default_rng(3).standard_normal((4, 6)).astype(np.float32)
    if name == "F32":
        raw, expected = values.tobytes(), values
    elif name == "F16":
        raw, expected = values.astype("<f2").tobytes(), values.astype("<f2").astype(np.float32)
    else:
        top = values.view(np.uint32) >> 16
        raw, expected = top.astype("<u2").tobytes(), (top << 16).view(np.float32)
    type_id = int(gguf.GGMLQuantizationType[name])
    file = GGUFFile(build(tmp_path / "m.gguf", infos=(info("w", (6, 4), type_id),), data=raw))
    np.testing.assert_array_equal(file.tensor("w"), expected)
    file.forget("w")
    np.testing.assert_array_equal(file.rows("w", 3, 4), expected[3:])


def test_every_supported_type_is_tested_and_sized_as_ggml_says() -> None:
    assert {name for name, _, _ in TENSOR_TYPES.values()} == {*DECODERS, "F32", "F16", "BF16"}
    for type_id, (name, block, block_bytes) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(type_id)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (block, block_bytes))


def test_metadata_of_every_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    expected: dict[str, Any] = {
        "a.u8": 200,
        "a.i8": -100,
        "a.u16": 60000,
        "a.i16": -30000,
        "a.u32": 1 << 31,
        "a.i32": -(1 << 31),
        "a.u64": 1 << 63,
        "a.i64": -(1 << 63),
        "a.f32": 0.5,
        "a.f64": 0.1,
        "a.bool": True,
        "a.string": "naïve 世界\nline\0",
        "a.strings": ["", "x", "é"],
        "a.ints": [1, -2, 3],
        "a.floats": [0.5, -0.25],
        "a.bools": [True, False],
    }
    adders = (
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float32",
        "float64",
        "bool",
    )
    for (key, value), kind in zip(expected.items(), (*adders, "string"), strict=False):
        getattr(writer, f"add_{kind}")(key, value)
    for key, value in expected.items():
        if isinstance(value, list):
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    assert {key: file.metadata[key] for key in expected} == expected
    assert file.architecture == "llama"


def test_alignment_and_version_2(tmp_path: Path) -> None:
    entries = (ARCHITECTURE, entry("general.alignment", U32, struct.pack("<I", 64)))
    values = np.arange(16, dtype="<f4")
    infos = (info("a", (8,), offset=0), info("b", (8,), offset=64))
    path = build(tmp_path / "m.gguf", version=2, entries=entries, infos=infos)
    raw = path.read_bytes()
    path.write_bytes(raw + bytes(-len(raw) % 64) + values[:8].tobytes() + bytes(32) + values[8:].tobytes())
    file = GGUFFile(path)
    np.testing.assert_array_equal(file.tensor("a"), values[:8])
    np.testing.assert_array_equal(file.tensor("b"), values[8:])


NOT_GGUF = [
    (b"", "empty"),
    (b"GG", "starts with"),
    (b"ggjt" + bytes(100), "starts with"),
    (b"FUGG" + bytes(100), "starts with"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 98\n", "git-LFS"),
    (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    (b"PK\x03\x04" + bytes(60), "pickled"),
    (b"\x80\x04\x95" + bytes(60), "pickled"),
    (b"\x1f\x8b" + bytes(60), "gzip"),
]


@pytest.mark.parametrize(("content", "said"), NOT_GGUF)
def test_not_a_gguf_file(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    message = problem(tmp_path / "m.gguf")
    assert "not a GGUF file" in message and said in message


@pytest.mark.parametrize(
    ("version", "said"), [(0, "version 0"), (1, "version 1"), (99, "version 99"), (3 << 24, "big-endian")]
)
def test_wrong_version(tmp_path: Path, version: int, said: str) -> None:
    assert said in problem(build(tmp_path / "m.gguf", version=version))


HUGE = [1 << 63, (1 << 64) - 1, 1 << 40, 1 << 21]


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize("field", ["num_entries", "num_tensors"])
def test_huge_counts(tmp_path: Path, field: str, count: int) -> None:
    counts: dict[str, Any] = {field: count}
    assert str(count) in problem(build(tmp_path / "m.gguf", **counts))


def test_counts_that_fit_the_file_but_not_its_content(tmp_path: Path) -> None:
    path = build(tmp_path / "m.gguf", num_entries=500, data=b"\xff" * 20_000)
    assert "metadata key" in problem(path)


@pytest.mark.parametrize("length", HUGE)
def test_huge_strings_and_arrays(tmp_path: Path, length: int) -> None:
    long = struct.pack("<Q", length)
    broken = {
        "key": long + b"abc",
        "value": entry("a", STRING, long + b"abc"),
        "array": entry("a", ARRAY, struct.pack("<I", U32) + long),
        "strings": entry("a", ARRAY, struct.pack("<I", STRING) + long),
        "element": array("a", STRING, 2, string("x") + long),
    }
    for name, bad in broken.items():
        problem(build(tmp_path / f"{name}.gguf", entries=(ARCHITECTURE, bad)))


def test_nested_arrays(tmp_path: Path) -> None:
    nested = struct.pack("<IQ", ARRAY, 1) * 10_000 + struct.pack("<IQ", U32, 0)
    assert "array of arrays" in problem(build(tmp_path / "m.gguf", entries=(entry("deep", ARRAY, nested),)))


def word(value: int) -> bytes:
    return struct.pack("<I", value)


BAD_ENTRIES = [
    ((entry("a", 13, b""),), "unknown type 13"),
    ((array("a", 99, 1, b""),), "unknown type 99"),
    ((ARCHITECTURE, ARCHITECTURE), "twice"),
    ((entry("a", STRING, string(b"\xff\xfe")),), "UTF-8"),
    ((entry("a", U32, word(1)),), "general.architecture"),
    ((entry("general.architecture", U32, word(1)),), "general.architecture"),
    ((ARCHITECTURE, entry("general.alignment", U32, word(0))), "general.alignment"),
    ((ARCHITECTURE, entry("general.alignment", U32, word(33))), "general.alignment"),
    ((ARCHITECTURE, entry("general.alignment", F32, struct.pack("<f", 32))), "general.alignment"),
    ((ARCHITECTURE, entry("split.count", U32, word(4))), "is part 1 of 4, but not named"),
    ((ARCHITECTURE, entry("split.count", STRING, string("4"))), "split.count must be a count"),
]


@pytest.mark.parametrize(("entries", "said"), BAD_ENTRIES)
def test_bad_metadata(tmp_path: Path, entries: tuple[bytes, ...], said: str) -> None:
    assert said in problem(build(tmp_path / "m.gguf", entries=entries, data=bytes(64)))


BAD_TENSORS = [
    ((info("w", (8,)), info("w", (8,))), "twice"),
    ((info("w", (8, 1 << 40)),), "truncated"),
    ((info("w", (1 << 62, 1 << 62, 1 << 62, 1 << 62)),), "truncated"),
    ((info("w", (65,)),), "truncated"),
    ((info("w", (8,), offset=256),), "truncated"),
    ((info("w", (8,), offset=(1 << 64) - 32),), "truncated"),
    ((info("w", (8,), offset=8),), "multiple of 32"),
    ((info("w", (0, 8)),), "dimension of 0"),
    ((info("w", ()),), "0 dimensions"),
    ((info("w", (1, 1, 1, 1, 1)),), "5 dimensions"),
    ((info("w", (16,), 8),), "do not fill Q8_0 blocks"),
    ((info("w", (256,), int(gguf.GGMLQuantizationType.IQ2_XXS)),), "IQ2_XXS"),
    ((info("w", (256,), int(gguf.GGMLQuantizationType.TQ1_0)),), "TQ1_0"),
    ((info("w", (8,), 4),), "number 4"),
    ((info("w", (8,), 1 << 31),), "number 2147483648"),
    ((info(b"\xff", (8,)),), "UTF-8"),
    ((info("x" * 5000, (8,)),), "too long"),
]


@pytest.mark.parametrize(("infos", "said"), BAD_TENSORS)
def test_bad_tensors(tmp_path: Path, infos: tuple[bytes, ...], said: str) -> None:
    assert said in problem(build(tmp_path / "m.gguf", infos=infos, data=bytes(256)))


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    entries = (ARCHITECTURE, array("t", STRING, 2, string("ab") + string("c")), array("n", U32, 2, bytes(8)))
    whole = build(tmp_path / "m.gguf", entries=entries, infos=(info("w", (8,)),), data=bytes(32)).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "m.gguf").write_bytes(whole[:length])
        problem(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(whole)
    GGUFFile(tmp_path / "m.gguf")


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    """Any damage of the header opens or is refused, quickly; nothing else is raised."""
    entries = (ARCHITECTURE, array("t", STRING, 2, string("ab") + string("c")), array("n", U32, 2, bytes(8)))
    whole = build(tmp_path / "m.gguf", entries=entries, infos=(info("w", (8,)),), data=bytes(32)).read_bytes()
    for at in range(len(whole) - 32):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[at] ^= flip
            (tmp_path / "m.gguf").write_bytes(damaged)
            try:
                file = GGUFFile(tmp_path / "m.gguf")
                for name in file.tensors:
                    file.tensor(name)
            except ModelFileError as error:
                assert "\n" not in str(error)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_lies_cost_no_memory(tmp_path: Path) -> None:
    """The refusal of huge claims fits in 64 MiB beyond what the interpreter and numpy have."""
    claims = (
        {"num_tensors": 1 << 63},
        {"num_entries": 1 << 63},
        {"entries": (ARCHITECTURE, entry("a", STRING, struct.pack("<Q", 1 << 63)))},
        {"entries": (ARCHITECTURE, array("a", U32, 1 << 62, b""))},
        {"infos": (info("w", (1 << 31, 1 << 31)),)},
    )
    paths = [str(build(tmp_path / f"{i}.gguf", **claim)) for i, claim in enumerate(claims)]  # type: ignore[arg-type]
    code = (
        "import re, sys; from pathlib import Path\n"
        "from microvllm.adapters.files.gguf_file import GGUFFile, ModelFileError\n"
        # Not getrusage's ru_maxrss, which begins with that of the process that started this one.
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        "for path in sys.argv[1:]:\n"
        "    try: GGUFFile(Path(path)); sys.exit('opened')\n"
        "    except ModelFileError: pass\n"
        "sys.exit(peak() - before > 64 << 10)"
    )
    assert subprocess.run([sys.executable, "-c", code, *paths], timeout=300).returncode == 0


def test_missing_and_unreadable(tmp_path: Path) -> None:
    assert "cannot be read" in problem(tmp_path / "absent.gguf")
    assert "is not a regular file" in problem(tmp_path)


# The real file. Offsets and values were taken from its bytes with struct alone.


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return find_model(DEMO_MODEL)


@pytest.mark.model
def test_smollm2_opens_quickly(smollm2: Path) -> None:
    times = []
    for _ in range(3):
        started = time.thread_time()
        file = GGUFFile(smollm2)
        times.append((time.thread_time() - started) / slowness())
    assert min(times) < 3  # 0.3 s
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert len(file.metadata["tokenizer.ggml.merges"]) == 48900
    assert file.metadata["llama.rope.freq_base"] == 100000.0
    assert len(file.tensors) == 272
    assert file.tensors["token_embd.weight"].shape == (49152, 576)
    assert file.tensors["blk.29.ffn_down.weight"].shape == (576, 1536)
    assert {tensor.type for tensor in file.tensors.values()} == {"F32", "Q4_1", "Q8_0"}


@pytest.mark.model
def test_smollm2_by_hand(smollm2: Path) -> None:
    """A row of a Q4_1 and one of a Q8_0 tensor: d * q + m and d * q, read with struct at their offsets."""
    file = GGUFFile(smollm2)
    raw = smollm2.read_bytes()
    tensor = file.tensors["blk.7.attn_k.weight"]
    assert (tensor.type, tensor.shape) == ("Q4_1", (192, 576))
    at = tensor.offset + 5 * (576 // 32 * 20)  # row 5
    expected = []
    for block in range(576 // 32):
        d, m = struct.unpack_from("<2e", raw, at + 20 * block)
        packed = raw[at + 20 * block + 4 : at + 20 * block + 20]
        expected += [d * (byte & 15) + m for byte in packed] + [d * (byte >> 4) + m for byte in packed]
    np.testing.assert_allclose(file.rows("blk.7.attn_k.weight", 5, 6)[0], expected, rtol=1e-6)
    at = file.tensors["token_embd.weight"].offset + 504 * (576 // 32 * 34)
    expected = []
    for block in range(576 // 32):
        d, *quants = struct.unpack_from("<e32b", raw, at + 34 * block)
        expected += [d * q for q in quants]
    np.testing.assert_allclose(file.rows("token_embd.weight", 504, 505)[0], expected, rtol=1e-6)
