"""EDM pickles made here: what is read, and that nothing else is, whatever its bytes are."""

import copyreg
import io
import os
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bdense_core.edm import read_edm_pickle
from bdense_core.errors import CheckpointError, UnsafePickle

# --- an EDM pickle, written by hand ---------------------------------------------------------------------


class Call:
    """Pickled as a call of a global with these arguments, and attributes where given."""

    def __init__(self, name, *args, state=None):
        self.name, self.args, self.state = name, args, state


class _Writer(pickle._Pickler):
    """Writes names of modules that need not exist."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Call):
            module, _, name = obj.name.rpartition(".")
            if self.proto >= 4:
                super().save(module)
                super().save(name)
                self.write(pickle.STACK_GLOBAL)
            else:
                self.write(f"c{module}\n{name}\n".encode())
            super().save(tuple(obj.args))
            self.write(pickle.REDUCE)
            if obj.state is not None:
                super().save(obj.state)
                self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)


def dumps(value, protocol=4):
    file = io.BytesIO()
    _Writer(file, protocol).dump(value)
    return file.getvalue()


def storage_bytes(numbers, dtype=torch.float32):
    file = io.BytesIO()
    untyped = torch.tensor(numbers, dtype=dtype).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
    torch.save(storage, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def tensor(numbers, size, stride, offset=0, dtype=torch.float32, content=None):
    content = storage_bytes(numbers, dtype) if content is None else content
    storage = Call("torch.storage._load_from_bytes", content)
    return Call(
        "torch._utils._rebuild_tensor_v2", storage, offset, size, stride, False, Call("collections.OrderedDict")
    )


def parameter(data):
    return Call("torch._utils._rebuild_parameter", data, True, Call("collections.OrderedDict"))


def module(class_name="Linear", *, source="", kwargs=None, parameters=None, buffers=None, modules=None, passing=()):
    state = {
        "training": False,
        "_parameters": parameters or {},
        "_buffers": buffers or {},
        "_non_persistent_buffers_set": set(passing),
        "_modules": modules or {},
        "_init_args": (),
        "_init_kwargs": {} if kwargs is None else kwargs,
    }
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return Call("torch_utils.persistence._reconstruct_persistent_obj", meta)


KWARGS = {"img_resolution": 4, "img_channels": 1, "model_type": "DhariwalUNet", "channel_mult": [1]}


def network(**parts):
    return {"ema": module("EDMPrecond", **({"kwargs": KWARGS} | parts))}


def read(tmp_path, content):
    path = tmp_path / "net.pkl"
    path.write_bytes(content if isinstance(content, bytes) else dumps(content))
    return read_edm_pickle(path)


def refused(tmp_path, content, match, kind=CheckpointError):
    with pytest.raises(kind, match=match) as refusal:
        read(tmp_path, content)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


# --- what is read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_parameters_and_buffers_come_by_their_names_in_order(tmp_path, protocol, dtype):
    child = module(parameters={"w": parameter(tensor(range(6), (3, 2), (1, 3), dtype=dtype)), "bias": None})
    top = network(
        modules={"model": child, "none": None},
        parameters={"p": parameter(tensor([7, 8, 9], (2,), (1,), offset=1, dtype=dtype))},
        buffers={"kept": tensor([5], (), (), dtype=dtype), "passing": tensor([6], (1,), (1,)), "empty": None},
        passing=["passing"],
    )
    found = read(tmp_path, dumps(top, protocol))
    assert list(found.state) == ["p", "kept", "model.w"]
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in found.state.values())
    assert found.state["p"].tolist() == [8, 9]
    assert found.state["kept"].tolist() == 5
    assert found.state["model.w"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found.config.img_resolution == 4


def test_numpy_scalars_easy_dicts_and_old_sets_become_plain_values(tmp_path):
    def scalar(module, code, content, order="<"):
        dtype = Call("numpy.dtype", code, False, True, state=(3, order, None, None, None, -1, -1, 0))
        return Call(f"numpy.{module}.multiarray.scalar", dtype, content)

    kwargs = KWARGS | {
        "dropout": scalar("core", "f8", struct.pack("<d", 0.25)),
        "label_dropout": scalar("_core", "f4", struct.pack(">f", 0.5), ">"),
        "label_dim": scalar("core", "i8", struct.pack("<q", 7)),
        "use_fp16": scalar("core", "b1", b"\x01", "|"),
    }
    easy = Call("dnnlib.util.EasyDict")
    names = Call("builtins.set", ["a", "b"])
    found = read(tmp_path, network(kwargs=kwargs) | {"settings": easy, "names": names})
    assert (found.config.dropout, found.config.label_dropout, found.config.label_dim) == (0.25, 0.5, 7)


def test_source_text_that_defines_the_class_is_dropped_and_not_run(tmp_path):
    marker = tmp_path / "run"
    text = f"open({str(marker)!r}, 'w')\n@decorated\nclass EDMPrecond(torch.nn.Module):\n    pass\n"
    assert read(tmp_path, network(source=text)).class_name == "EDMPrecond"
    assert not marker.exists()


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("posix.system", "builtins.eval", "builtins.getattr", "__builtin__.exec", "subprocess.Popen"),
        *("models.networks_edm.EDMPrecond", "torch.load", "torch.FloatStorage", "collections.OrderedDict.fromkeys"),
        *("numpy.core.multiarray._reconstruct", "copyreg._reconstructor", "builtins.bytearray"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_any_other_name_is_refused_by_that_name(tmp_path, name, protocol):
    refused(tmp_path, dumps(network() | {"more": Call(name)}, protocol), name.replace(".", r"\."), UnsafePickle)


def test_module_and_name_are_taken_as_they_stand(tmp_path):
    """A space within the module's name must not turn into the dot before a known name."""
    refused(tmp_path, b"\x80\x04\x8c\x0dtorch storage\x8c\x10_load_from_bytes\x93.", "torch storage", UnsafePickle)


def test_texts_with_odd_escapes_are_refused_without_a_warning(tmp_path):
    refused(tmp_path, b"S'\\d'\n.", "no EDM checkpoint")


def test_a_name_is_refused_inside_a_storage_too(tmp_path):
    inner = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001)) + dumps(Call("os.system"), 2)
    refused(tmp_path, network(buffers={"b": tensor([], (), (), content=inner)}), r"os\.system", UnsafePickle)


def test_source_text_without_the_class_is_refused(tmp_path):
    refused(tmp_path, network(source="import os\nclass EDMPrecondX: pass"), "source text", UnsafePickle)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\x82\x01", id="EXT1"),
        pytest.param(b"\x83\x01\x00", id="EXT2"),
        pytest.param(b"\x84\x01\x00\x00\x00", id="EXT4"),
        pytest.param(b"Pname\n", id="PERSID"),
        pytest.param(b"NQ", id="BINPERSID"),
        pytest.param(b"(ccollections\nOrderedDict\no", id="OBJ"),
        pytest.param(b"(icollections\nOrderedDict\n", id="INST"),
        pytest.param(b"ccollections\nOrderedDict\n)}\x92", id="NEWOBJ_EX"),
        pytest.param(b"\x97", id="NEXT_BUFFER"),
        pytest.param(b"\x96\x01\x00\x00\x00\x00\x00\x00\x00a", id="BYTEARRAY8"),
    ],
)
def test_instructions_that_no_checkpoint_needs_are_refused(tmp_path, body):
    refused(tmp_path, b"\x80\x05" + body + b".", "is refused: ", UnsafePickle)


def test_a_registered_extension_is_not_called(tmp_path):
    copyreg.add_extension("posix", "getpid", 0xBD)
    try:
        refused(tmp_path, b"\x80\x02\x82\xbd)R.", "EXT1", UnsafePickle)
    finally:
        copyreg.remove_extension("posix", "getpid", 0xBD)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"ccollections\nOrderedDict\n}(\x8c\x08__init__K\x01ub.", "sets attributes of a Global"),
        (b"ccollections\nOrderedDict\n)R}(\x8c\x0c__setstate__K\x01ub.", "sets attributes of a dict"),
        (b"}}(\x8c\x09__class__K\x01ub.", "sets attributes of a dict"),
        (b"ccollections\nOrderedDict\n)R)R.", "calls something"),
        (b"\x8c\x05posix)R.", "calls something"),
        (b"\x8c\x05posixN\x93.", "name is no text"),
        (b"cnumpy\ndtype\n\x8c\x02O8\x85R.", "'O8', which is no number"),
        (b"cnumpy\ndtype\nccollections\nOrderedDict\n\x85R.", "which is no number"),
    ],
)
def test_tricks_with_calls_and_attributes_are_refused(tmp_path, body, reason):
    refused(tmp_path, b"\x80\x04" + body, reason, UnsafePickle)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b".", b"s.", b"u.", b"t.", b"(.", b"h\x05.", b"\x94.", b"\x85.", b"R.", b"b.", b"N(s.", b"(Ns.", b"NN."),
        *(
            b"]K\x01\x8c\x01as.",
            b"}K\x01K\x02s.",
            b"}]K\x02s.",
            b"\x8f(]\x90.",
            b"N(K\x01e.",
            b"}(K\x01u.",
            b"N.",
            b"}.",
        ),
        b"}\x8c\x03emaNs.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",  # bytes of an absurd length
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",  # a frame of it
        b"Nr\xff\xff\xff\xff.",  # a slot of the memo that would need gigabytes in a list
        b"\x8b\xff\xff\xff\x7f",  # a number
    ],
)
def test_nonsense_is_no_checkpoint(tmp_path, body):
    tracemalloc.start()
    try:
        refused(tmp_path, b"\x80\x04" + body, r"net\.pkl is no EDM checkpoint")
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04" + bytes(64), b"<!DOCTYPE html>\n<html>", b"\xff" * 100, bytes(100), b"{}"]
)
def test_files_of_another_kind_are_no_checkpoints(tmp_path, content):
    refused(tmp_path, content, r"net\.pkl is ")


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "gone.pkl", tmp_path):
        with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
            read_edm_pickle(path)


def test_a_giant_file_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "giant.pkl").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="more than any of them"):
        read_edm_pickle(tmp_path / "giant.pkl")


def test_a_file_of_endless_instructions_is_given_up(tmp_path):
    refused(tmp_path, b"\x80\x04" + b"}" * 1_100_000 + b".", "more than 1000000 instructions")


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        *(((4,), (1,), 3), ((7,), (1,), 0), ((2,), (6,), 0), ((3, 2), (2, 3), 0), ((1,), (1,), 6), ((), (), 6)),
        *(((10**12,), (0,), 0), ((2**40, 2**40), (0, 0), 0), ((7,), (0,), 0), ((0, 10**30), (1, 1), 0)),
        *(((2,), (-1,), 1), ((-1,), (1,), 0), ((1,), (1,), -1), ((1,), (), 0), ((True,), (1,), 0), ((1.0,), (1,), 0)),
        *(((1,) * 100, (1,) * 100, 0), ((1,), (10**30,), 0)),
    ],
)
def test_tensors_that_reach_outside_their_numbers_are_refused(tmp_path, size, stride, offset):
    bad = tensor(range(6), size, stride, offset)
    refused(tmp_path, network(parameters={"p": parameter(bad)}), "a tensor (reaches outside|has sizes)")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x18"),  # the magic number
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        (b"storage", b"sturage"),
        (b"FloatStorage", b"DoublStorage"),
        (b"FloatStorage", b"HalfStorage"),
        (b"K\x03", b"K\x04"),
        (b"K\x03", b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
        (b"\x03\x00\x00\x00\x00\x00\x00\x00", b"\x04\x00\x00\x00\x00\x00\x00\x00"),
    ],
)
def test_storages_that_do_not_fit_their_description_are_refused(tmp_path, old, new):
    content = storage_bytes([1, 2, 3])
    assert old in content
    bad = tensor([], (3,), (1,), content=content.replace(old, new, 1))
    refused(tmp_path, network(parameters={"p": parameter(bad)}), "storage|Storage")


def test_many_tensors_of_one_storage_do_not_take_more_memory_than_the_file(tmp_path):
    content = storage_bytes([0.0] * 10_000)  # one object, which the file has once
    many = {f"p{number}": tensor([], (10_000,), (1,), content=content) for number in range(100)}
    assert len(dumps(network(buffers=many))) < 60_000
    refused(tmp_path, network(buffers=many), "more numbers than the file has bytes")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"kwargs": {"img_resolution": 4}}, "lacks img_channels"),
        ({"kwargs": KWARGS | {"colour": 1}}, "unknown key network.colour"),
        ({"kwargs": KWARGS | {"model_type": "Other"}}, "'Other' is not supported"),
        ({"kwargs": KWARGS | {"model_type": ["SongUNet"]}}, "has the wrong kind"),
        ({"kwargs": KWARGS | {"channel_mult": [[1]]}}, "list of lists"),
        ({"kwargs": KWARGS | {"img_resolution": 10**30}}, "no number"),
        ({"kwargs": KWARGS | {"model_type": "x" * 1000}}, "no number, text"),
        ({"parameters": {"p": 3}}, "p is no tensor"),
        ({"parameters": {"p": parameter(tensor([1], (1,), (1,), dtype=torch.int64))}}, "floating-point"),
        ({"buffers": {"b": tensor([True], (1,), (1,), dtype=torch.bool)}}, "floating-point"),
        ({"parameters": {"a.b": None}}, "impossible names"),
        ({"modules": {"m": 3}}, "m is no module"),
        ({"modules": {"m": Call("collections.OrderedDict")}}, "m is no module"),
    ],
)
def test_networks_that_cannot_be_are_named(tmp_path, parts, reason):
    refused(tmp_path, network(**parts), reason)


def test_other_wrappers_and_contents_are_named(tmp_path):
    refused(tmp_path, {"ema": module("Other", kwargs=KWARGS)}, "'Other' is not supported")
    refused(tmp_path, {"G_ema": 1, "D": 2}, "no entry 'ema', only G_ema, D")
    refused(tmp_path, [1], "no entry 'ema', only no dictionary")
    refused(tmp_path, dumps(network()) + b"more", "more than one value")


def container(level, modules):
    """A ModuleDict in the memo's slot `level`."""
    name = b"ctorch.nn.modules.container\nModuleDict\n)\x81q" + bytes([level])
    rest = b"\x8c\x0b_parameters}\x8c\x08_buffers}\x8c\x0c_init_kwargs}"
    return name + b"}(" + rest + b"\x8c\x08_modules}(" + modules + b"uub"


def test_modules_within_themselves_are_refused(tmp_path):
    nested = module()
    for _ in range(20):
        nested = module(modules={"m": nested})
    refused(tmp_path, network(modules={"m": nested}), "occurs twice, or in itself")
    top = container(7, b"\x8c\x01mh\x07")
    refused(tmp_path, b"\x80\x04}\x8c\x03ema" + top + b"s.", "occurs twice, or in itself")


def test_a_module_under_many_names_does_not_multiply(tmp_path):
    top = container(0, b"")
    for level in range(1, 15):  # each has the one before under two names
        top = container(level, b"\x8c\x01a" + top + b"\x8c\x01bh" + bytes([level - 1]))
    refused(tmp_path, b"\x80\x04}\x8c\x03ema" + top + b"s.", "occurs twice, or in itself")


# --- damage ---------------------------------------------------------------------------------------------

WHOLE = dumps(
    network(
        modules={"model": module(parameters={"w": parameter(tensor(range(6), (3, 2), (2, 1)))})},
        buffers={"b": tensor([1.5], (1,), (1,))},
    )
)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    assert read(tmp_path, WHOLE).state
    for length in range(len(WHOLE)):
        refused(tmp_path, WHOLE[:length], r"net\.pkl is ")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@example([(0, 0)])
def test_changed_bytes_give_a_network_or_one_line(tmp_path, changes):
    content = bytearray(WHOLE)
    for position, value in changes:
        content[position] = value
    harmless(tmp_path, bytes(content))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([op.code.encode("latin-1") for op in pickletools.opcodes] + [b"\x01", b"a\n"])))
def test_any_instructions_give_one_line(tmp_path, codes):
    harmless(tmp_path, b"\x80\x04" + b"".join(codes) + b".")


def harmless(folder: Path, content: bytes) -> None:
    path = folder / "fuzz.pkl"
    path.write_bytes(content)
    before = os.listdir(folder)  # noqa: PTH208
    try:
        read_edm_pickle(path)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
    assert os.listdir(folder) == before  # noqa: PTH208
