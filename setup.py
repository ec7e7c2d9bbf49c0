"""The native build: one optional stable-ABI extension, ``mmfast._C``."""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU = "csrc/cpu"

# The kernels are compiled once per instruction set; the processor chooses at run time.
AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
VNNI = [*AVX512, "-mavx512vnni"]  # no more than every processor with VNNI has
ISA_FLAGS = {
    "baseline": ["-march=x86-64"],
    "avx2": ["-march=x86-64-v3"],
    "avx512": AVX512,
    "avx512vnni": VNNI,
    "avx512bf16": [*VNNI, "-mavx512bf16"],
    "amx": [*VNNI, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


def torch_root() -> Path | None:
    """Where torch is installed, found without importing it.

    An isolated build does not see the environment's packages, but knows where they are; the
    stable ABI needs no more than their headers and libraries.
    """
    spec = find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places.append(Path(sysconfig.get_path("purelib")) / "torch")
    found = (p.absolute() for p in places if (p / "include/torch/csrc/stable/library.h").exists())
    return next(found, None)


def wanted() -> bool:
    """Whether to try to build the extension here."""
    if os.environ.get("MMFAST_NO_EXTENSION", "0") == "1":
        print("mmfast: MMFAST_NO_EXTENSION=1, installing without the C++ kernels", file=sys.stderr)
        return False
    if sys.platform != "linux" or platform.machine() != "x86_64":
        print(
            f"mmfast: no C++ kernels for {sys.platform} {platform.machine()}, "
            "the reference implementations will serve",
            file=sys.stderr,
        )
        return False
    return True


def is_current(made: Path, command: str) -> bool:
    """Whether a file was made by ``command`` after all that it was made of last changed.

    GCC leaves the names of these beside it in a rule for make, ``x.d`` for ``x.o``.
    """
    rule, stamp = made.with_suffix(".d"), made.with_suffix(".cmd")
    if not (made.exists() and rule.exists() and stamp.exists() and stamp.read_text() == command):
        return False
    names = rule.read_text().partition(": ")[2].replace("\\\n", " ").split()
    newest = max((Path(n).stat().st_mtime_ns if Path(n).exists() else sys.maxsize) for n in names)
    return newest <= made.stat().st_mtime_ns


class BuildExtension(build_ext):
    """Adds each file's own flags, compiles what has changed, files side by side, and never fails
    the install."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # Where `setup.py build_ext` keeps them: an editable install compiles what has changed.
            tag = f"{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = str(Path("build") / f"temp.{tag}")

    def build_extension(self, ext: Extension) -> None:
        compile_one, link = self.compiler._compile, self.compiler.link_shared_object
        jobs = []

        with ThreadPoolExecutor(os.cpu_count()) as pool:

            def compile_later(obj, src, ext_name, cc_args, extra_args, pp_opts):
                path = Path(src)
                level = path.stem.partition("_")[0] if path.parent.name == "isa" else "baseline"
                flags = ISA_FLAGS[level]
                job = (obj, src, ext_name, cc_args, [*extra_args, *flags, "-MMD"], pp_opts)
                made, options = Path(obj), [*self.compiler.compiler_so_cxx, *cc_args, *job[4]]
                # Not where headers are looked for: the rule names those that were found.
                command = " ".join(o for o in options if not o.startswith("-I"))

                def compile_changed():
                    if not is_current(made, command):
                        stamp = made.with_suffix(".cmd")
                        stamp.unlink(missing_ok=True)
                        compile_one(*job)
                        stamp.write_text(command)

                jobs.append(pool.submit(compile_changed))

            def link_when_compiled(*args, **kwargs):
                for job in jobs:
                    job.result()
                link(*args, **kwargs)

            self.compiler._compile = compile_later
            self.compiler.link_shared_object = link_when_compiled
            try:
                super().build_extension(ext)
            except Exception as error:
                print(
                    f"mmfast: the C++ kernels were not built ({error}); the reference "
                    "implementations will serve. `python -m mmfast info` shows this.",
                    file=sys.stderr,
                )
                if os.environ.get("MMFAST_REQUIRE_EXTENSION", "0") == "1":
                    raise
            finally:
                self.compiler._compile, self.compiler.link_shared_object = compile_one, link

    def copy_extensions_to_source(self) -> None:
        self.extensions = [
            e
            for e in self.extensions
            if Path(self.get_ext_fullpath(e.name)).exists()
            or (Path(self.build_lib) / self.get_ext_filename(e.name)).exists()
        ]
        super().copy_extensions_to_source()


def extension(torch: Path) -> Extension:
    """The one extension: bindings, kernel glue, and the kernels per instruction set."""
    import pybind11

    sources = [
        "csrc/module.cpp",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(f"{CPU}/*.cpp")),
    ]
    sources += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(f"{CPU}/isa/*.cpp"))
    return Extension(
        "mmfast._C",
        sources=sources,
        depends=[str(p.relative_to(ROOT)) for p in ROOT.glob(f"{CPU}/**/*.h")],
        include_dirs=[
            str(torch / "include"),
            str(torch / "include/torch/csrc/api/include"),
            str(Path(pybind11.get_include()).absolute()),
            "csrc",
        ],
        library_dirs=[str(torch / "lib")],
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020b000000000000"),
            ("MMFAST_TORCH_TARGET", '"2.11"'),
        ],
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-g0",
            "-ffp-contract=off",
            "-fno-math-errno",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
            "-Wno-unused-function",  # headers serve several files
            "-Wno-maybe-uninitialized",
            "-Wno-uninitialized",
        ],
        language="c++",
    )


torch = torch_root()
build = wanted()
setup(
    ext_modules=[extension(torch)] if build and torch else [],
    cmdclass={"build_ext": BuildExtension},
    # Read by the build frontend: with no torch in reach, ask for one to compile against.
    setup_requires=["torch>=2.11"] if build and torch is None else [],
)
