"""Build of the extension `packedcomm._native`.

The CUDA part is built when nvcc is found (PACKEDCOMM_BUILD_CUDA=0 leaves it out, =1 makes its
absence an error), for the architectures in PACKEDCOMM_BUILD_ARCHITECTURES ("80,90,100"). Nothing of
torch or NCCL is linked; the CUDA runtime is linked statically.
"""

import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# In machine code, and the newest as PTX for what comes after.
ARCHITECTURES = "80,90,100"
HOST_FLAGS = ["-O3", "-fno-trapping-math", "-Wall", "-Wextra", "-fvisibility=hidden"]


def find_nvcc() -> str | None:
    wanted = os.environ.get("PACKEDCOMM_BUILD_CUDA", "auto")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        raise SystemExit("PACKEDCOMM_BUILD_CUDA=1, but nvcc is neither in CUDA_HOME nor on PATH")
    return nvcc


def toolkit_root(nvcc: str) -> Path:
    """The toolkit that nvcc belongs to; on PATH it may be a wrapper script, so nvcc is asked."""
    text = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    for line in text.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return Path(nvcc).resolve().parent.parent


def gencode_flags(nvcc: str) -> tuple[list[str], list[int]]:
    listed = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    wanted = os.environ.get("PACKEDCOMM_BUILD_ARCHITECTURES") or ARCHITECTURES
    architectures = sorted(int(a) for a in wanted.split(",") if f"sm_{a.strip()}" in listed)
    if not architectures:
        raise SystemExit(f"this nvcc builds for none of the architectures {wanted}: {listed}")
    newest = architectures[-1]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"], architectures


class BuildExtension(build_ext):
    """Compiles `.cu` sources with nvcc, everything else as usual."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        strict = os.environ.get("PACKEDCOMM_BUILD_WERROR") == "1"
        ext.extra_compile_args = [*ext.extra_compile_args, *(["-Werror"] if strict else [])]
        cuda_sources = [s for s in ext.sources if s.endswith(".cu")]
        ext.sources = [s for s in ext.sources if not s.endswith(".cu")]
        # Object files of another variant (with or without CUDA) must not be linked by accident, nor
        # an extension of another variant be taken for up to date.
        variant = "cuda" if cuda_sources else "cpu"
        stamp = Path(self.build_temp) / "variant"
        self.force = self.force or not stamp.exists() or stamp.read_text() != variant
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(variant)
        self.build_temp = str(Path(self.build_temp) / variant)
        for source in cuda_sources:
            ext.extra_objects.append(self.compile_cuda(source, strict))
        super().build_extension(ext)

    def compile_cuda(self, source: str, strict: bool) -> str:
        nvcc = find_nvcc()
        assert nvcc is not None
        target = Path(self.build_temp) / (source + ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        flags, _ = gencode_flags(nvcc)
        self.spawn(
            [nvcc, "-std=c++17", "-O3", "--threads=2", *flags]
            + [
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden,-Wall,-Wextra" + (",-Werror" if strict else ""),
            ]
            + (["-Werror=all-warnings"] if strict else [])
            + ["-c", source, "-o", str(target)]
        )
        return str(target)


def extension() -> Pybind11Extension:
    sources = sorted(str(p) for p in Path("csrc").rglob("*.cpp"))
    macros: list[tuple[str, str | None]] = []
    library_dirs: list[str] = []
    libraries: list[str] = []
    nvcc = find_nvcc()
    if nvcc is None:
        print("packedcomm: nvcc not found, building without the CUDA copy engine")
    else:
        root = toolkit_root(nvcc)
        _, architectures = gencode_flags(nvcc)
        sources += sorted(str(p) for p in Path("csrc").rglob("*.cu"))
        text = ",".join(f"sm_{a}" for a in architectures) + f",compute_{architectures[-1]}"
        macros = [("PACKEDCOMM_CUDA_ARCHITECTURES", f'"{text}"')]
        library_dirs = [str(d) for d in (root / "lib64", root / "lib") if d.is_dir()]
        libraries = ["cudart_static", "rt", "dl", "pthread"]
    return Pybind11Extension(
        "packedcomm._native",
        sources,
        cxx_std=17,
        define_macros=macros,
        library_dirs=library_dirs,
        libraries=libraries or ["dl", "pthread"],
        extra_compile_args=HOST_FLAGS,
        depends=["setup.py", *sorted(str(p) for p in Path("csrc").rglob("*.[hc]*"))],
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
