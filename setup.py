"""Only the optional native extension; everything else is in pyproject.toml.

The extension is a plain C library loaded with ctypes, not a Python module. Without a compiler the install succeeds
and sparsec says once that it runs the reference path.
"""

from setuptools import Extension, setup

CPU = "backends/kernel/cpu"

setup(
    ext_modules=[
        Extension(
            "sparsec.backends.kernel.cpu._kernels",
            sources=[
                f"{CPU}/{name}.cpp"
                for name in ("stream", "linear", "kernels_avx512", "kernels_avx2", "kernels_portable")
            ],
            depends=[f"{CPU}/{name}.h" for name in ("stream", "kernels", "unroll", "vector")],
            # No -march: each file names the instructions it uses, and the library asks the processor before it does.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        )
    ]
)
