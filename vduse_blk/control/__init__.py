"""What the server of a disk and the programs that talk to it share: names, places, messages, exit codes.

Places. Every disk has a directory ``/run/vduse-blk/NAME/`` (0700) with ``state.json``, ``log`` and
``control.sock``. Its server holds ``flock()`` on the directory itself for as long as it lives, so "is it
served?" has one answer which the kernel keeps right through any death: the lock. The directory is made before
anything else of a disk and removed after everything else; whoever removes it does so under that lock, and
whoever takes the lock checks that the path still leads to what was locked.

Messages. A unix stream socket; one JSON object per line in each direction, one reply per request, in order::

    {"op": "detach", "force": false}
    {"ok": true}  |  {"ok": false, "error": "one sentence", "code": 4, "holders": [...]}

Start. ``attach`` hands a server its ``WorkerSpec`` as JSON on standard input, and in ``ready_fd`` the number
of an inherited pipe. The server writes exactly one line there and closes it: ``ready_line`` or
``failure_line``. Before that line either side may give up: a reader that closes its end asks the server to
undo everything and exit; an end of file without a line means that the server died.

Standard library only: the command line, the server and the node daemon all import this.
"""

from __future__ import annotations
