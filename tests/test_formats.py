"""Saved programs: equal after loading, written whole or not at all, checked."""

import dataclasses
import json
import os
import pathlib
import stat
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import qjax
from experiments.benchmarks import sizes
from qjax.graph import atomic, files, manifest
from tests.models import images


@pytest.fixture(scope="module")
def program():
    params = {"w": jnp.float32(np.random.default_rng(0).normal(size=(4, 3)))}
    fn = lambda params, x: {"y": [x[0] @ params["w"], (jnp.mean(x[1], 1),)]}
    x = (images(5, 4), images(5, 2))
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [(x,)])
    return qjax.lower(qmodel, params, qstate, x)


@pytest.fixture
def path(program, tmp_path):
    path = tmp_path / "model.qjax"
    program.save(path)
    return path


# Written by qjax 0.1 in each format version: inputs, what the program gave, the
# program. Version 1 chooses rows and places, 2 and 3 are one loop with a softmax.
GOLDEN = pathlib.Path(__file__).parent / "golden" / "programs"
GOLDEN_X = np.float32(np.random.default_rng(0).normal(size=5 * 6 + 6 * 6 + 6 * 3 + 60))
GOLDEN_X = GOLDEN_X[-60:].reshape(4, 3, 5)
RESERVED = {"__manifest__", "__small__"}


def test_files_of_format_version_1_load():
    program = qjax.load(GOLDEN / "version1.qjax")
    wanted = np.load(GOLDEN / "version1.npz")
    found = program.codes(wanted["x"], wanted["ids"])
    assert set(found) == {"best", "out"}
    for name, codes in found.items():
        np.testing.assert_array_equal(codes, wanted[name], err_msg=name)


@pytest.mark.parametrize("version", [2, 3])
def test_files_of_format_versions_2_and_3_load(version):
    program = qjax.load(GOLDEN / f"version{version}.qjax", check=version == 3)
    wanted = np.load(GOLDEN / f"version{version}.npz")
    found = program.codes(wanted["x"])
    assert set(found) == {"out", "state"}
    for name, codes in found.items():
        np.testing.assert_array_equal(codes, wanted[name], err_msg=name)


def test_the_bytes_of_version_3_do_not_change(tmp_path):
    """But those of the compressed tensors may, with another zlib."""
    program = qjax.load(GOLDEN / "version3.qjax")
    program.save(tmp_path / "again.qjax", golden=GOLDEN_X)
    tensors = [
        safetensors.numpy.load_file(path)
        for path in (tmp_path / "again.qjax", GOLDEN / "version3.qjax")
    ]
    assert list(tensors[0]) == list(tensors[1])
    for name, array in tensors[0].items():
        if name in ("__manifest__", "__small__"):
            array, other = (zlib.decompress(t[name].tobytes()) for t in tensors)
        else:
            array, other = array.tobytes(), tensors[1][name].tobytes()
        assert array == other or name == "__manifest__", name


def test_a_loaded_program_is_equal(program, path):
    loaded = qjax.load(path)
    assert loaded.graph == program.graph
    assert loaded.input_tree == program.input_tree
    assert loaded.output_tree == program.output_tree
    assert loaded.params.keys() == program.params.keys()
    for name, param in program.params.items():
        assert loaded.params[name].shape == param.shape
        assert loaded.params[name].dtype == param.dtype
    x = (images(5, 4, seed=3), images(5, 2, seed=4))
    pairs = zip(jax.tree.leaves(loaded(x)), jax.tree.leaves(program(x)), strict=True)
    for found, wanted in pairs:
        np.testing.assert_array_equal(found, wanted)
    assert os.listdir(path.parent) == ["model.qjax"]


def test_kernels_are_plain_safetensors(program, path):
    arrays = safetensors.numpy.load_file(path)
    assert set(arrays) == {"w", "__manifest__", "__small__"}
    np.testing.assert_array_equal(arrays["w"], program.params["w"])


@pytest.mark.heavy
@pytest.mark.parametrize("bits, most", [(8, 0.27), (4, 0.15), (2, 0.09)])
def test_a_resnet_takes_this_part_of_its_float_file(bits, most):
    state, program = sizes.lowered("resnet-8", bits)
    assert sizes.float_bytes(state) == 317_904
    assert sizes.saved(program) <= most * 317_904


def test_large_parameters_are_tensors_and_scales_are_none(tmp_path):
    """A bias for each of many channels, at each place; scales stay out of the JSON."""
    params = {"w": images(2, 5000), "b": images(5, 5000)}
    fn = lambda params, x: x @ params["w"] + params["b"]
    x = images(5, 2)
    scheme = qjax.Scheme(qjax.QSpec(8, narrow_range=True, axis=-1), qjax.QSpec(8))
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    program, path = qjax.lower(qmodel, params, qstate, x), tmp_path / "m.qjax"
    program.save(path)
    arrays = safetensors.numpy.load_file(path)
    assert set(arrays) >= {"w", *RESERVED} and len(arrays) > 3
    assert len(zlib.decompress(arrays["__manifest__"].tobytes())) < 10_000
    loaded = qjax.load(path)
    assert loaded.graph == program.graph
    for name, param in program.params.items():
        np.testing.assert_array_equal(loaded.params[name], param)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((3, 0, 2), np.int16),
        np.int32(-(2**31)),
        np.int32([[70000, -1]]),
        np.uint16([65535]),
        np.int8([]),
    ],
)
def test_small_arrays_there_and_back(x):
    small = manifest.SmallArrays()
    numbers = [small.add(a) for a in (np.float32(1.5), manifest.smallest(x), x, x)]
    assert numbers[2] == numbers[3]
    forms = json.loads(json.dumps(small.forms))
    found = manifest.read_small(forms, small.compressed())
    for k, dtype in zip(numbers[1:3], (None, x.dtype), strict=True):
        assert found[k].shape == x.shape and dtype in (None, found[k].dtype)
        np.testing.assert_array_equal(found[k], x)
    assert found[0] == np.float32(1.5)


def test_equal_programs_make_equal_files(program, path, tmp_path):
    other = tmp_path / "other.qjax"
    qjax.load(path).save(other)
    assert other.read_bytes() == path.read_bytes()


def test_every_truncation_is_found(path):
    data = path.read_bytes()
    for size in sorted({0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1}):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated, or no safetensors file"):
            qjax.load(path)


def test_every_altered_byte_is_found(path):
    """No flipped byte loads as another program."""
    data = path.read_bytes()
    wanted = qjax.load(path)
    for i in np.random.default_rng(0).choice(len(data), 150, replace=False):
        altered = bytearray(data)
        altered[i] ^= 0x01
        path.write_bytes(altered)
        try:
            found = qjax.load(path)
        except ValueError:
            continue
        # Padding of the header is no content.
        assert found.graph == wanted.graph
        for name in wanted.params:
            np.testing.assert_array_equal(found.params[name], wanted.params[name])


@pytest.mark.parametrize("name", ["w", "__small__", "__manifest__"])
def test_an_altered_tensor_is_named(path, name):
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    end = json.loads(data[8 : 8 + size])[name]["data_offsets"][1]
    data[8 + size + end - 1] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"was altered: .*'{name}' does not"):
        qjax.load(path)


def test_golden_codes(program, tmp_path):
    path, x = tmp_path / "golden.qjax", (images(3, 4, seed=3), images(3, 2, seed=4))
    program.save(path, golden=(x,))
    names = set(safetensors.numpy.load_file(path))
    golden = {f"__golden__/{n}" for n in ("inputs/0", "inputs/1", "outputs/0")}
    assert golden | {"__golden__/outputs/1"} == names & (names - {"w"}) - RESERVED
    loaded = qjax.load(path, check=True)
    assert loaded.params.keys() == program.params.keys()
    assert program.golden_differences(path) == (0, 0)
    moved = {**program.params, "w": program.params["w"][::-1]}
    other = dataclasses.replace(program, params=moved)
    assert max(other.golden_differences(path)) > 0
    alone = tmp_path / "alone.qjax"
    program.save(alone, golden=x)  # The only input.
    assert alone.read_bytes() == path.read_bytes()


def test_golden_codes_of_another_program(program, path, tmp_path):
    with pytest.raises(ValueError, match="has no golden vectors: they are saved with"):
        qjax.load(path, check=True)
    one = qjax.load(GOLDEN / "version3.qjax")
    with pytest.raises(ValueError, match="2 inputs and 2 outputs, got 1 and 2"):
        program.golden_differences(GOLDEN / "version3.qjax")
    with pytest.raises(ValueError, match="takes inputs nested as"):
        one.save(tmp_path / "x.qjax", golden=(images(2, 3), images(2, 3)))
    tensors = safetensors.numpy.load_file(GOLDEN / "version3.qjax")
    outputs = tensors["__golden__/outputs/0"]
    for name, x, message in (
        ("__golden__/outputs/0", outputs + np.int8(1), "computes other codes"),
        ("__golden__/outputs/0", outputs[None], "must be int8.*, got"),
        ("__golden__/outputs/7", outputs, "no inputs or outputs for"),
    ):
        altered = tmp_path / "altered.qjax"
        write(altered, {**tensors, name: x})
        with pytest.raises(ValueError, match=message):
            qjax.load(altered, check=True)
    assert not (tmp_path / "x.qjax").exists()


def write(path, tensors):
    """Writes tensors of a program with right checksums."""
    fields = files.read_manifest(tensors["__manifest__"])
    own = {name: x for name, x in tensors.items() if name != "__manifest__"}
    fields["sha256"] = {name: files.checksum(x) for name, x in own.items()}
    manifest = files.write_manifest(fields)
    header = {"format": "qjax.integer_program", "version": "3"}
    header["sha256"] = files.checksum(manifest)
    own["__manifest__"] = manifest
    path.write_bytes(safetensors.numpy.save(own, header))


def test_a_foreign_file(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="not an integer program"):
        qjax.load(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="no safetensors file"):
        qjax.load(path)
    with pytest.raises(FileNotFoundError):
        qjax.load(tmp_path / "missing.qjax")


def test_a_later_version(path):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    metadata = header["__metadata__"] | {"version": "4"}
    arrays = safetensors.numpy.load_file(path)
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    with pytest.raises(ValueError, match="format version 4"):
        qjax.load(path)


def test_a_failed_write_leaves_the_old_file(program, path, monkeypatch):
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        program.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["model.qjax"]


@pytest.mark.parametrize("step", ["write", "fsync", "link", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_whatever_ends_a_write_leaves_nothing(program, path, monkeypatch, step, error):
    """At each step, with files without a name and with named ones only."""
    before = path.read_bytes()

    def fail(*args, **options):
        raise error("ended")

    if step == "write":
        monkeypatch.setattr(atomic, "_fill", fail)
    else:
        monkeypatch.setattr(os, step, fail)
    for nameless in (atomic._open_nameless, lambda folder: None):
        monkeypatch.setattr(atomic, "_open_nameless", nameless)
        if step == "link" and error is OSError:  # There is another way.
            program.save(path)
            assert qjax.load(path).graph == program.graph
        elif step != "link" or nameless("."):
            with pytest.raises(error, match="ended"):
                program.save(path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == ["model.qjax"]


@pytest.mark.parametrize("is_nameless", [True, False])
def test_the_mode_is_that_of_the_umask_or_of_the_file(
    program, tmp_path, monkeypatch, is_nameless
):
    if not is_nameless:
        monkeypatch.setattr(atomic, "_open_nameless", lambda folder: None)
    mode = lambda path: stat.S_IMODE(os.stat(path).st_mode)
    for umask in (0o022, 0o077, 0o002):
        path, before = tmp_path / f"{umask}.qjax", os.umask(umask)
        try:
            program.save(path)
        finally:
            os.umask(before)
        assert mode(path) == 0o666 & ~umask
        path.chmod(0o640)
        program.save(path)
        assert mode(path) == 0o640


def test_a_link_stays_and_its_file_is_written(program, tmp_path):
    (tmp_path / "models").mkdir()
    link = tmp_path / "latest.qjax"
    link.symlink_to("models/first.qjax")
    for _ in range(2):  # The file is not there, then it is.
        program.save(link)
        assert os.readlink(link) == "models/first.qjax"
        assert qjax.load(link).graph == program.graph
    assert os.listdir(tmp_path / "models") == ["first.qjax"]
    turning = tmp_path / "turning.qjax"
    turning.symlink_to("turning.qjax")
    with pytest.raises(OSError, match="symbolic links"):
        program.save(turning)
    assert sorted(os.listdir(tmp_path)) == ["latest.qjax", "models", "turning.qjax"]


def test_file_and_folder_are_on_disk(program, path, monkeypatch):
    synced, sync = [], os.fsync

    def note(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    monkeypatch.setattr(os, "fsync", note)
    program.save(path)
    assert len(synced) == 2 and synced[1] == str(path.parent)


def test_names_that_no_file_holds(program, tmp_path):
    name = next(iter(program.params))
    for other in ("w\ud800", "__metadata__"):
        nodes = tuple(
            dataclasses.replace(
                node,
                params={k: other if p == name else p for k, p in node.params.items()},
            )
            for node in program.graph.nodes
        )
        renamed = dataclasses.replace(
            program,
            graph=dataclasses.replace(program.graph, nodes=nodes),
            params={other if k == name else k: p for k, p in program.params.items()},
        )
        with pytest.raises(ValueError, match="Rename .* in the model"):
            renamed.save(tmp_path / "model.qjax")
        assert not list(tmp_path.iterdir())


def test_what_stays_in_float_is_not_saved(tmp_path):
    program = qjax.lower(lambda x: jnp.sin(x), images(2, 3), strict=False)
    assert program.residues
    with pytest.raises(ValueError, match="not whole, so no file can hold it"):
        program.save(tmp_path / "model.qjax")
    assert not list(tmp_path.iterdir())


def test_outputs_that_no_file_can_name(tmp_path):
    fn = lambda params, x: qjax.QParams(x @ params, jax.nn.relu(x))
    params, x = jnp.ones((3, 3)), images(2, 3)
    qmodel = qjax.quantize_model(fn, params, x)
    program = qjax.lower(qmodel, params, qjax.calibrate(qmodel, params, [x]), x)
    with pytest.raises(ValueError, match="tuples, lists and dicts.*got QParams"):
        program.save(tmp_path / "model.qjax")
    assert not list(pathlib.Path(tmp_path).iterdir())
