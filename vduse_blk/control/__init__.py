"""What the server of a disk and the programs that talk to it share.

    errors     exit codes, and the errors that carry them
    rundir     a disk's name, its directory, and the lock that says whether it is served
    notes      what servers note in that directory: the disk's state now, and what became of them
    spec       what a server must know to serve a disk
    settings   the administrator's file of settings
    messages   what is said on the control socket, and to whoever started a server
    client     saying it
    status     disks as seen from outside
    process    servers as the kernel sees them

Standard library only: the command line, the server and the node daemon all import this.
"""
