"""The wheel's tag: any Python 3, this machine. It holds programs, no extension modules."""

import os

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel


class ProgramWheel(bdist_wheel):
    """A wheel of programs for one kind of machine."""

    def get_tag(self):
        """Return the tag. Not manylinux: it needs no libc of the host at all."""
        return "py3", "none", f"linux_{os.uname().machine}"


class Programs(Distribution):
    """A distribution whose files depend on the machine."""

    def has_ext_modules(self):
        """Return True, so that the files lie in the wheel's root, for platlib."""
        return True


setup(cmdclass={"bdist_wheel": ProgramWheel}, distclass=Programs)
