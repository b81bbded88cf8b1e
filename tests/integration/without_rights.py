"""Run a module as a user whom file modes bind: root gives up its capabilities, so that mode 000 keeps it out too.

python -m tests.integration.without_rights MODULE ...
"""

import ctypes
import os
import runpy
import sys

_VERSION_3 = 0x20080522


def give_up_rights() -> None:
    """Clear the capabilities of this process (Linux); nothing changes for a user who has none."""
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice 32 bits
    if ctypes.CDLL(None, use_errno=True).capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    if os.geteuid() == 0:
        give_up_rights()
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
