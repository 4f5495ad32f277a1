"""Builds the native kernels where there is a C++ compiler; without one XLA runs."""

import concurrent.futures
import hashlib
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent
NATIVE = pathlib.Path("qjax", "backends", "native")
LIBRARY = "libqjax_native.so"
MACHINES = {"amd64": "x86_64", "x86_64": "x86_64", "arm64": "aarch64"}
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -pthread".split()


def find_compiler():
    """Returns the compiler, or None: of `CXX`, or the first that there is."""
    if "CXX" in os.environ:
        return os.environ["CXX"].split() or None
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return found and [found]


def works(compiler, flags=()):
    """Returns whether a compiler makes shared libraries of C++17, with flags."""
    if not compiler or os.name == "nt":
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "try.cc")
        source.write_text("#include <string_view>\nint x = std::string_view{}.size();")
        command = [*compiler, *FLAGS, *flags, "-shared", str(source)]
        command += ["-o", f"{folder}/try.so"]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def headers():
    """Returns the folder of the headers of XLA's calls, in jaxlib, or None."""
    spec = importlib.util.find_spec("jaxlib")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = pathlib.Path(place, "include")
        if (folder / "xla" / "ffi" / "api" / "ffi.h").exists():
            return folder
    return None


def sources(compiler):
    """Returns the files to compile here, each with its flags.

    A file of an instruction set that the compiler does not know is left out; the others
    see which sets there are: `isa_avx2.cc` defines `QJAX_AVX2`.
    """
    machine = platform.machine().lower()
    machine = MACHINES.get(machine, machine)
    include, found, sets = headers(), [], []
    for line in (ROOT / NATIVE / "src" / "sources.txt").read_text().splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, where, *flags = line.split()
        if where == "ffi":
            if include is None:
                print("qjax: no headers of jaxlib: native kernels without jit")
                continue
            flags += ["-DQJAX_NATIVE_FFI=1", "-isystem", str(include)]
        elif where not in ("any", machine) or not works(compiler, flags):
            continue
        if where != "ffi" and flags:
            sets.append(f"-D{name[:-3].replace('isa', 'QJAX').upper()}")
        found.append((name, flags))
    return [(name, [*sets, *flags]) for name, flags in found]


def build(target):
    """Compiles the library to a path; raises CalledProcessError if it cannot."""
    compiler, folder = find_compiler(), ROOT / NATIVE / "src"
    strict = ["-Werror"] if os.environ.get("QJAX_NATIVE_WERROR") == "1" else []
    cache = ROOT / "build" / "native"
    cache.mkdir(parents=True, exist_ok=True)
    shared = b"".join(path.read_bytes() for path in sorted(folder.glob("*.h")))
    with tempfile.TemporaryDirectory() as made:

        def compiled(entry):
            name, flags = entry
            command = [*compiler, *FLAGS, *strict, *flags, "-c", str(folder / name)]
            content = " ".join(command).encode() + shared + (folder / name).read_bytes()
            out = cache / f"{name}.{hashlib.sha256(content).hexdigest()[:16]}.o"
            if not out.exists():  # The same text by the same command.
                beside = os.path.join(made, f"{name}.o")
                subprocess.run([*command, "-o", beside], check=True)
                shutil.move(beside, out)
            return str(out)

        workers = os.cpu_count() or 1
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            objects = list(pool.map(compiled, sources(compiler)))
        whole = os.path.join(made, LIBRARY)
        link = [*compiler, "-shared", "-pthread", "-o", whole, *objects]
        subprocess.run(link, check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Whoever has loaded the old file keeps it.
        beside = target.with_name(f"{LIBRARY}.{os.getpid()}")
        shutil.copyfile(whole, beside)
        os.replace(beside, target)


def try_build(target):
    """Compiles the library, or says why there is none; then XLA runs."""
    if not works(find_compiler()):
        print("qjax: no C++ compiler: no native kernels, XLA runs programs")
        return False
    try:
        build(target)
    except (OSError, subprocess.CalledProcessError) as error:
        if os.environ.get("QJAX_NATIVE_BUILD") == "1":
            raise
        print(f"qjax: native kernels do not compile, XLA runs programs: {error}")
        target.unlink(missing_ok=True)  # Of other sources.
        return False
    return True


def main():
    """Runs setuptools, with the library among what it builds."""
    from setuptools import Distribution, setup
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_py import build_py
    from setuptools.command.editable_wheel import editable_wheel

    class NativeDistribution(Distribution):
        """A package with a library of the platform, if it was built."""

        def has_ext_modules(self):
            return works(find_compiler())

    class BuildPackage(build_py):
        """Builds the library beside the modules."""

        def run(self):
            super().run()
            if not self.editable_mode:
                try_build(pathlib.Path(self.build_lib).resolve() / NATIVE / LIBRARY)

    class BuildEditable(editable_wheel):
        """Builds the library in the checkout, where editable installs look."""

        def run(self):
            try_build(ROOT / NATIVE / LIBRARY)
            super().run()

    class BuildWheel(bdist_wheel):
        """Names one wheel a platform: the library has no interface to Python."""

        def get_tag(self):
            *_, own = super().get_tag()
            made = pathlib.Path(self.get_finalized_command("build").build_lib)
            is_there = (made / NATIVE / LIBRARY).exists()
            return "py3", "none", own if is_there else "any"

    setup(
        distclass=NativeDistribution,
        cmdclass={
            "build_py": BuildPackage,
            "editable_wheel": BuildEditable,
            "bdist_wheel": BuildWheel,
        },
        setup_requires=["jaxlib>=0.10.2"] if works(find_compiler()) else [],
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["build_native"]:  # Of a checkout that is not installed.
        sys.exit(0 if try_build(ROOT / NATIVE / LIBRARY) else 1)
    main()
