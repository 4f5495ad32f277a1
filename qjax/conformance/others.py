"""Loaders of runtimes that read the files of other formats."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from qjax.conformance.session import Codes, Loader, Session
from qjax.ends import real_input
from qjax.formats.onnx import write_onnx_qdq
from qjax.formats.tflite import write_tflite
from qjax.graph.graph import Value
from qjax.program import IntegerProgram

Writer = Callable[[IntegerProgram], bytes]


def load_onnx_runtime(write: Writer, *, is_real: bool = False) -> Loader:
    """Returns the loader of a file of ONNX into ONNX Runtime.

    Args:
      write: Writes the file.
      is_real: Whether it takes and gives real values, not codes.
    """

    def load(program: IntegerProgram, codes: Codes) -> Session:
        data = write(program)
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        # By default products with weights of 4 bits quantize the other operand anew.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        providers = ["CPUExecutionProvider"]
        session = runtime.InferenceSession(data, options, providers=providers)
        names = [end.name for end in session.get_inputs()]

        def run(inputs: Codes) -> list[np.ndarray]:
            return session.run(None, dict(zip(names, inputs, strict=True)))

        return Session(_on_codes(program, run) if is_real else run, len(data))

    return load


def load_openvino(program: IntegerProgram, codes: Codes) -> Session:
    """Loads the file of `write_onnx_qdq` into OpenVINO.

    Raises:
      ValueError: for integers that need int64, which its CPU computes as int32.
    """
    data = write_onnx_qdq(program, opset=21)  # It has no int2.
    openvino, onnx = map(importlib.import_module, ("openvino", "onnx"))
    wide = {"BitShift", "Mod"} & set(_kinds(onnx.load_model_from_string(data).graph))
    if wide:
        raise ValueError(
            f"OpenVINO's CPU computes int64 as int32, and the file of `write_onnx_qdq` "
            f"has {', '.join(sorted(wide))} of int64. ONNX Runtime computes it."
        )
    core = openvino.Core()
    model = core.compile_model(core.read_model(data), "CPU")

    def run(inputs: Codes) -> list[np.ndarray]:
        found = model(list(inputs))
        return [found[end] for end in model.outputs]

    return Session(_on_codes(program, run), len(data))


def _kinds(graph: Any) -> Iterator[str]:
    """Yields the operators of an ONNX graph and of those inside of it."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _kinds(attribute.g)


def _on_codes(
    program: IntegerProgram, run: Callable[[Codes], list[np.ndarray]]
) -> Callable[[Codes], list[np.ndarray]]:
    """Returns a function of codes by one of the real values of a program."""
    values = program.graph.values

    def run_codes(codes: Codes) -> list[np.ndarray]:
        pairs = zip(codes, (values[v] for v in program.graph.inputs), strict=True)
        found = run([real_input(q, v) for q, v in pairs])
        ends = (values[v] for v in program.graph.outputs)
        return [_codes_of(x, v) for x, v in zip(found, ends, strict=True)]

    return run_codes


def _codes_of(x: np.ndarray, v: Value) -> np.ndarray:
    if v.grid is None:
        return np.asarray(x)
    steps = np.asarray(x, np.float64) / v.grid.array().astype(np.float64)
    return np.rint(steps).astype(np.int64) + v.grid.zero_point


def load_litert(resolver: str, *, is_exact: bool = True) -> Loader:
    """Returns the loader of the file of `write_tflite` into LiteRT.

    Args:
      resolver: The kernels, by LiteRT's name.
      is_exact: Whether a program that rounds otherwise is refused.
    """

    def load(program: IntegerProgram, codes: Codes) -> Session:
        data = write_tflite(program, exact=is_exact)
        litert = importlib.import_module("ai_edge_litert.interpreter")
        kind = getattr(litert.OpResolverType, resolver)
        own = litert.Interpreter(
            model_content=data, experimental_op_resolver_type=kind, num_threads=1
        )
        own.allocate_tensors()
        inputs = [end["index"] for end in own.get_input_details()]
        outputs = [end["index"] for end in own.get_output_details()]

        def run(codes: Codes) -> list[np.ndarray]:
            for place, q in zip(inputs, codes, strict=True):
                own.set_tensor(place, q)
            own.invoke()
            return [own.get_tensor(place) for place in outputs]

        return Session(_in_parts(program, run), len(data))

    return load


def load_tflite_micro(program: IntegerProgram, codes: Codes) -> Session:
    """Loads the file of `write_tflite` into tflite-micro."""
    data = write_tflite(program)
    micro = importlib.import_module("tflite_micro").runtime
    own = micro.Interpreter.from_bytes(data)

    def run(codes: Codes) -> list[np.ndarray]:
        for place, q in enumerate(codes):
            own.set_input(q, place)
        own.invoke()
        return [own.get_output(k) for k in range(len(program.graph.outputs))]

    return Session(_in_parts(program, run), len(data))


def _in_parts(
    program: IntegerProgram, run: Callable[[Codes], list[np.ndarray]]
) -> Callable[[Codes], list[np.ndarray]]:
    """Returns a function of any number of examples by one of the traced number.

    The last part is filled with its last example, whose copies are cut again.
    """
    inputs = [program.graph.values[v] for v in program.graph.inputs]
    is_free = [bool(v.shape) and not v.fixed_by for v in inputs]
    if not any(is_free):
        return run
    size = next(v.shape[0] for v, free in zip(inputs, is_free, strict=True) if free)
    ends = lambda codes: jax.eval_shape(program.run_codes, program.params, *codes)

    def part(q: np.ndarray, begin: int, free: bool) -> np.ndarray:
        if not free:
            return q
        own = q[begin : begin + size]
        return np.concatenate([own, *[own[-1:]] * (size - len(own))])

    def run_all(codes: Codes) -> list[np.ndarray]:
        pairs = [*zip(codes, is_free, strict=True)]
        count = next(len(q) for q, free in pairs if free)
        if not count:  # Nothing to compute.
            return [np.zeros(x.shape, x.dtype) for x in ends(codes)]
        found = [
            run([part(q, begin, free) for q, free in pairs])
            for begin in range(0, count, size)
        ]
        if len(found) == 1 and count == size:
            return found[0]
        parts = zip(*found, strict=True)
        return [_joined(a, x.shape) for a, x in zip(parts, ends(codes), strict=True)]

    return run_all


def _joined(parts: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Joins the parts of an output along the axis of its examples, whichever it is."""
    pairs = zip(parts[0].shape, shape, strict=True)
    axis = next((d for d, (own, whole) in enumerate(pairs) if own != whole), 0)
    return np.concatenate(parts, axis).take(range(shape[axis]), axis)


def load_qonnx(write: Any, *, is_real: bool = False) -> Loader:
    """Returns the loader of a file of QONNX into the executor of its package.

    Args:
      write: Writes the file for a batch size.
      is_real: Whether it takes and gives real values, not codes.
    """

    def load(program: IntegerProgram, codes: Codes) -> Session:
        inputs = [program.graph.values[v] for v in program.graph.inputs]
        pairs = zip(inputs, codes, strict=True)
        free = [len(q) for v, q in pairs if v.shape and not v.fixed_by]
        data = write(program, batch_size=max(free, default=1))
        onnx = importlib.import_module("onnx")
        wrapper = importlib.import_module("qonnx.core.modelwrapper").ModelWrapper
        execute = importlib.import_module("qonnx.core.onnx_exec").execute_onnx
        shapes = importlib.import_module("qonnx.transformation.infer_shapes")
        model = wrapper(onnx.load_from_string(data)).transform(shapes.InferShapes())
        names = [end.name for end in model.graph.input]
        outputs = [end.name for end in model.graph.output]

        def run(inputs: Codes) -> list[np.ndarray]:
            given = (np.asarray(x, np.float32) for x in inputs)
            found = execute(model, dict(zip(names, given, strict=True)))
            return [found[name] for name in outputs]

        return Session(_on_codes(program, run) if is_real else run, len(data))

    return load
