"""Only the optional native libraries; everything else is in pyproject.toml.

They are plain C libraries, not Python modules: two are loaded with ctypes, the third by onnxruntime. Without a compiler
the install succeeds, and sparsec says once that it runs the reference path.
"""

from setuptools import Extension, setup

CPU = "backends/kernel/cpu"
FLOAT_SOURCES = ("stream", "linear", "rows", "tokens", "kernels_avx512", "kernels_avx2", "kernels_portable")
FLOAT_HEADERS = ("stream", "linear", "job", "kernels", "unroll", "vector", "token_kernel", "scratch")
SOURCES = (*FLOAT_SOURCES, "int8_stream", "int8_linear", "int8_vnni", "int8_avx2", "int8_portable")
HEADERS = (*FLOAT_HEADERS, "int8", "int8_avx2")
ORT_SOURCES = (*FLOAT_SOURCES, "ort_op")
ORT_HEADERS = (*FLOAT_HEADERS, "ort_api")
# No -march: each file names the instructions it uses, and the library asks the processor before it does.
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=fast"]

setup(
    ext_modules=[
        Extension(
            "sparsec.backends.kernel.cpu._kernels",
            sources=[f"{CPU}/{name}.cpp" for name in SOURCES],
            depends=[f"{CPU}/{name}.h" for name in HEADERS],
            extra_compile_args=[*FLAGS, "-fopenmp"],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        ),
        Extension(
            "sparsec.oneshot._sweep",
            sources=["sparsec/oneshot/sweep.cpp", "sparsec/oneshot/gram.cpp"],
            depends=["sparsec/oneshot/sweep_block.h", f"{CPU}/unroll.h"],
            include_dirs=[CPU],
            extra_compile_args=[*FLAGS, "-fopenmp", "-Wno-psabi"],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        ),
        # The same kernels as an operator of onnxruntime, on its threads: without OpenMP, and needing nothing else.
        Extension(
            "sparsec._ort",
            sources=[f"{CPU}/{name}.cpp" for name in ORT_SOURCES],
            depends=[f"{CPU}/{name}.h" for name in ORT_HEADERS],
            extra_compile_args=[*FLAGS, "-fvisibility=hidden"],
            language="c++",
            optional=True,
        ),
    ]
)
