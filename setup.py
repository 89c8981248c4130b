"""What pyproject.toml cannot say: the folder mapping of exporters/ and the two cffi modules."""

from setuptools import setup

setup(
    package_dir={"vduse_blk.exporters": "exporters"},
    cffi_modules=["pyvduse/build.py:ffi", "vduse_blk/core/build.py:ffi"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
