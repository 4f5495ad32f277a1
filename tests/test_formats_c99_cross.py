"""Programs in C on other machines: big-endian, 64-bit ARM, and a Cortex-M4.

Also with the sanitizers of gcc and clang, of a thousand inputs, and as C11.
"""

import shutil
import subprocess

import numpy as np
import pytest

from qjax.formats.c99 import write_c99
from qjax.formats.tflite import read_tflite
from qjax.graph import reference
from tests import test_formats_c99 as models
from tests import test_formats_c99_operations as nodes
from tests import test_formats_c99_steps as loops
from tests.c99_cases import STRICT, check_sanitizers, joined, random_codes, single
from tests.format_models import MODELS, SCHEMES
from tests.models import images
from tests.tflite_cases import _network, write

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("flax_promotion")]
BOARD = "-M mps2-an386 -nographic -semihosting-config enable=on,target=native -kernel"
TARGETS = {  # Compiler, its flags, what runs the file.
    "big-endian": ("powerpc-linux-gnu-gcc", ["-static"], ["qemu-ppc"]),
    "aarch64": ("aarch64-linux-gnu-gcc", ["-static"], ["qemu-aarch64"]),
    "sanitizers": (
        "gcc",
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        ["env"],
    ),
    "C11": ("clang", ["-std=c11"], ["env"]),
    "cortex-m4": (
        "arm-none-eabi-gcc",
        ["-mcpu=cortex-m4", "-mthumb", "--specs=rdimon.specs", "-Wl,-T,board.ld"],
        ["qemu-system-arm", *BOARD.split()],
    ),
}
LINKER = """
MEMORY { rom (rx) : ORIGIN = 0, LENGTH = 4M
         ram (rw) : ORIGIN = 0x20000000, LENGTH = 4M }
ENTRY(boot)
SECTIONS {
  .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) } > rom
  .ARM.exidx : { *(.ARM.exidx*) } > rom
  .data : { *(.data*) } > ram
  .bss : { *(.bss*) *(COMMON) } > ram
  end = .;
}
"""
BOOT = """
extern int main(void);
static void leave(int failed) {  /* By semihosting: no C library is started. */
  register int kind __asm__("r0") = 0x18;
  register int code __asm__("r1") = failed ? 0x20023 : 0x20026;
  __asm__ volatile("bkpt 0xab" : : "r"(kind), "r"(code));
}
void boot(void) { leave(main()); for (;;) {} }
__attribute__((section(".vectors"), used)) static const void *const vectors[] = {
  (const void *)0x20200000, (const void *)boot
};
"""


def _array(name, x, dtype):
    ctype = f"{np.dtype(dtype)}_t"
    flat = ", ".join(map(str, x.reshape(-1))) or "0"
    return f"static const {ctype} {name}[] = {{{flat}}};"


def main_of(program, seeds):
    """C that computes some inputs, and fails where a code is not the oracle's."""
    graph, lines, calls = program.graph, ['#include "model.h"'], []
    for seed in seeds:
        codes = random_codes(program, seed)
        values = reference.run(graph, program.params, codes)
        ends = []
        for k, (q, v) in enumerate(zip(codes, graph.inputs, strict=True)):
            lines.append(_array(f"x{seed}_{k}", q, graph.values[v].dtype))
            ends.append(f"x{seed}_{k}")
        checks = []
        for k, v in enumerate(graph.outputs):
            dtype, size = graph.values[v].dtype, values[v].size
            lines.append(_array(f"y{seed}_{k}", values[v], dtype))
            lines.append(f"static {dtype}_t z{seed}_{k}[{max(size, 1)}];")
            ends.append(f"z{seed}_{k}")
            one = f"if (z{seed}_{k}[i] != y{seed}_{k}[i]) return 1;"
            checks.append(f"  for (i = 0; i < {size}; ++i) {one}")
        calls += [f"  model_run({', '.join(ends)});", *checks]
    return "\n".join(
        [*lines, "int main(void) {", "  int i;", *calls, "  return 0;", "}"]
    )


def _programs():
    """Programs with a batch of the size that they were lowered with."""
    net, shape, own = models.CASES["convolutions"]
    yield models.lowered(net, images(*shape), **own)
    net, shape, own = models.CASES["a block"]
    yield models.lowered(net, images(*shape), **own)
    yield loops.lowered(loops._turned)
    yield read_tflite(write(_network("int8")))
    for family in (
        nodes._quotients,
        nodes._scatters,
        nodes._logarithms,
        nodes._products,
    ):
        yield joined([single(*case) for case in family()])


@pytest.mark.parametrize("name", TARGETS)
def test_other_machines_compute_the_codes_of_the_oracle(tmp_path, name):
    compiler, flags, command = TARGETS[name]
    for tool in (compiler, command[0]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if name == "sanitizers":
        check_sanitizers(compiler, flags)
    is_bare = "-Wl,-T,board.ld" in flags
    (tmp_path / "board.ld").write_text(LINKER)
    for program in _programs():
        shapes = [program.graph.values[v].shape for v in program.graph.inputs]
        write_c99(program, tmp_path, batch_size=shapes[0][0])
        text = main_of(program, range(2)) + (BOOT if is_bare else "")
        (tmp_path / "main.c").write_text(text)
        make = [compiler, *STRICT, "-O2", *flags, "-c", "model.c", "-o", "model.o"]
        more = ["-nostartfiles", "-std=gnu99"] if is_bare else []
        link = [compiler, "-O1", *flags, *more, "main.c", "model.o", "-o", "test"]
        for step in (make, link):
            done = subprocess.run(step, cwd=tmp_path, capture_output=True, text=True)
            assert not done.returncode, done.stderr
        done = subprocess.run([*command, "./test"], cwd=tmp_path, timeout=120)
        assert not done.returncode


READER = """
#include <stdio.h>
#include "model.h"
static {x} x[MODEL_IN0_SIZE];
static {y} y[MODEL_OUT0_SIZE];
int main(void) {{
  while (fread(x, sizeof x, 1, stdin)) {{
    model_run(x, y);
    fwrite(y, sizeof y, 1, stdout);
  }}
  return 0;
}}
"""
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_thousand_inputs_under_the_sanitizers(tmp_path, name, bits):
    """Codes of the whole range, one example a call; gcc and clang, all warnings."""
    net, shape = MODELS[name]
    own = SCHEMES["channel" if bits == 8 else "4 bits"]
    program = models.lowered(net, images(*shape), **own)
    graph = program.graph
    first, last = (graph.values[k[0]] for k in (graph.inputs, graph.outputs))
    rng = np.random.default_rng(0)
    size = (1000, *shape[1:])
    codes = rng.integers(first.low, first.high + 1, size).astype(first.dtype)
    values = reference.run(graph, program.params, [codes])
    wanted = values[graph.outputs[0]].astype(last.dtype)
    write_c99(program, tmp_path, batch_size=1)
    text = READER.format(x=f"{first.dtype}_t", y=f"{last.dtype}_t")
    (tmp_path / "main.c").write_text(text)
    for compiler in ("gcc", "clang"):
        check_sanitizers(compiler, SANITIZERS)
        make = [
            compiler,
            *STRICT,
            "-O2",
            *SANITIZERS,
            "main.c",
            "model.c",
            "-o",
            "test",
        ]
        done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        done = subprocess.run(
            ["./test"], cwd=tmp_path, input=codes.tobytes(), capture_output=True
        )
        assert not done.returncode, done.stderr
        found = np.frombuffer(done.stdout, last.dtype).reshape(wanted.shape)
        np.testing.assert_array_equal(found, wanted)
