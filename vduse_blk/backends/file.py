"""A regular file or a block device.

Two writers would destroy the data, so the storage is claimed while it is open, by means that end with the last I/O and
not with the process: a lock of the open file description (fcntl F_OFD_SETLK), and for a block device an exclusive open,
which also keeps file systems and device-mapper away.

What the lock covers. A writer locks every byte for itself. A reader shares every byte but 101 to 200: there QEMU tells who
writes or resizes (a byte from 100 locked: somebody does it; from 200: somebody forbids it; 0 is reading, 1 writing, 3
resizing; block/file-posix.c), and QEMU's readers expect nobody there. So readers of both kinds share a file, a writer of
either kind is alone. QEMU too locks first and then looks, so of two that start at once at least one notices the other.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from vduse_blk.block.batch import Batch
from vduse_blk.block.contract import Backend, BlockInfo, Fence, Segments, Support
from vduse_blk.block.errors import TEMPORARY, PermanentError, UserError
from vduse_blk.block.holders import Holder, holders_of, locks_on, loops_over
from vduse_blk.block.linux import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate, statx
from vduse_blk.block.native import FileTarget
from vduse_blk.block.options import Size, about
from vduse_blk.block.threads import Threads

_THREADS: Final = 16
_PIECES: Final = 1024  # IOV_MAX

_FLOCK: Final = struct.Struct("hhqqi0q")  # short l_type, l_whence; off_t l_start, l_len; pid_t l_pid
_EVERYTHING: Final = (0, 0)  # start, length; length 0 is to the end, wherever it will be
_READER_LOCKS: Final = ((0, 101), (201, 0))
_READER_TESTS: Final = (101, 100)

# linux/fs.h; these numbers differ on alpha, mips, powerpc and sparc
_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKIOOPT: Final = 0x1279
_BLKPBSZGET: Final = 0x127B

_BOUNCE: Final = 1 << 20

_PATIENCE: Final = 1.0
"""Seconds to wait for storage in use. A server that has ended lets go of it up to 50 ms later: its io_uring is taken down
by the kernel afterwards, and holds the file until then."""
_STEP: Final = 0.02

_BUSY: Final = 4  # exit codes
_DENIED: Final = 5

_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
}
_REASONS: Final = {  # errno of open(2) → (what to tell, exit code)
    errno.ENOENT: ("does not exist; a size creates it (--size 10G)", 2),
    errno.EEXIST: ("is a symbolic link to nothing, or was created by somebody else just now; try again", 2),
    errno.EACCES: ("may not be opened: no permission; run as root", _DENIED),
    errno.EPERM: ("may not be opened: not permitted (`lsattr` shows whether it is immutable)", _DENIED),
    errno.EROFS: ("is on a read-only file system; accepted is a read-only disk (--read-only)", 2),
    errno.ENOTDIR: ("does not exist: something in it is no directory", 2),
    errno.ELOOP: ("is a symbolic link that leads to itself", 2),
    errno.ENAMETOOLONG: ("is longer than a path can be", 2),
    errno.ENXIO: ("has no device behind it; attach the device first", 2),
    errno.ENODEV: ("has no device behind it; attach the device first", 2),
    errno.ENOMEDIUM: ("has no medium in it", 2),
    errno.ETXTBSY: ("is in use as a program or for swap", _BUSY),
    errno.ENOSPC: ("cannot be created: the file system is full", 1),
}


class FileBackend(Backend):
    """Owns one descriptor. Fields with an underscore are set by ``open`` and read by the threads."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        path: str = field(metadata=about("regular file or block device", place=True))
        size: Size | None = field(
            default=None, metadata=about("create the file with this size, sparse, if it does not exist")
        )
        direct: bool = field(default=False, metadata=about("go past the page cache (O_DIRECT)"))
        sync: bool = field(default=False, metadata=about("make every write durable before it completes (O_DSYNC)"))
        read_only: bool = field(default=False, metadata=about("open for reading only"))

    options: Options
    takes_batches = True
    fence = Fence.OPEN  # the lock: the kernel drops it after the last I/O

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._threads = self.batch_threads = Threads("file", _THREADS)
        self._fd = -1
        self._created: os.stat_result | None = None
        self._is_block_device = False
        self._align = 1  # of offset and length of direct I/O
        self._refused: set[int] = set()  # fallocate modes this storage does not know
        self._lost = memoryview(bytearray(4))  # FileTarget.lost

    def __str__(self) -> str:
        return self.options.path

    # ----------------------------------------------------------------------------------------------- contract

    async def open(self) -> BlockInfo:
        try:
            self._info = await self._threads.run(self._open)
        except BaseException:
            await self.abandon()
            raise
        return self._info

    async def close(self) -> None:
        self._threads.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def abandon(self) -> None:
        self._remove_created()
        await self.close()

    async def read(self, offset: int, into: Segments) -> None:
        await self._threads.run(self._transfer, os.preadv, offset, into)

    async def write(self, offset: int, data: Segments, *, fua: bool = False) -> None:
        await self._threads.run(self._transfer, os.pwritev, offset, data)

    async def flush(self) -> None:
        await self._threads.run(self._flush)

    async def discard(self, offset: int, length: int) -> None:
        await self._threads.run(self._discard, offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fua: bool = False) -> None:
        await self._threads.run(self._write_zeroes, offset, length, unmap)

    async def refresh(self) -> BlockInfo:
        self._info = dataclasses.replace(self._info, size=await self._threads.run(self._size))
        return self._info

    async def resize(self, size: int) -> BlockInfo:
        await self._threads.run(self._resize, size)
        return await self.refresh()

    def native_target(self) -> FileTarget:
        return FileTarget(self._fd, self._is_block_device, self._lost, TEMPORARY)

    def is_temporary(self, error: OSError) -> bool:
        return error.errno in TEMPORARY

    def remember_losses(self, mark: memoryview) -> None:
        self._lost = mark

    # --------------------------------------------------------------------------- opening, on a thread of its own

    def _open(self) -> BlockInfo:
        options = self.options
        flags = os.O_CLOEXEC | os.O_NOCTTY | (os.O_RDONLY if options.read_only else os.O_RDWR)
        if options.sync:
            flags |= os.O_DSYNC
        deadline = time.monotonic() + _PATIENCE
        while True:
            self._open_patiently(flags, deadline)
            self._lock(deadline)
            if self._is_at_its_path():
                break
            # Who had it before us removed it, or it was replaced: what was locked is nobody's storage.
            os.close(self._fd)
            self._fd = -1
            if time.monotonic() >= deadline:
                raise UserError(f"path: {self} is replaced again and again; stop whatever does it", _BUSY)
        if self._is_block_device:
            self._check_backing_file()
        else:
            self._check_loops()
        if options.direct:
            self._go_direct()
        self._check_size()
        return self._describe()

    def _open_patiently(self, flags: int, deadline: float) -> None:
        while True:
            try:
                self._open_descriptor(flags)
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                    raise self._refusal(error) from error
            time.sleep(_STEP)

    def _open_descriptor(self, flags: int) -> None:
        self._created = None
        path, size = self.options.path, self.options.size
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            if size is None or self.options.read_only:
                raise
            self._fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            self._created = os.fstat(self._fd)
            return
        # Before it is opened, too: a fifo would block, a tape would rewind.
        self._check_kind(mode)
        if stat.S_ISBLK(mode):
            flags |= os.O_EXCL  # without O_CREAT: alone among those who ask for it, the kernel's own users included
        self._fd = os.open(path, flags)
        mode = os.fstat(self._fd).st_mode
        self._check_kind(mode)
        self._is_block_device = stat.S_ISBLK(mode)

    def _check_kind(self, mode: int) -> None:
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            return
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise UserError(f"path: {self} is {kind}; accepted are regular files and block devices")

    def _refusal(self, error: OSError) -> UserError:
        """What the user can do about it."""
        path = self.options.path
        directory = os.path.dirname(os.path.abspath(path))
        if error.errno == errno.ENOENT and not os.path.isdir(directory):
            return UserError(f"path: {path} does not exist, nor does its directory; create {directory} first")
        if error.errno == errno.ENOENT and self.options.read_only:
            return UserError(f"path: {path} does not exist, and a read-only disk cannot create it")
        if error.errno == errno.EPERM and stat.S_ISBLK(os.stat(path).st_mode):
            return UserError(
                f"path: {path} may not be opened: this container may not use the device; allow it there", _DENIED
            )
        if error.errno == errno.EBUSY and os.path.exists(path):
            number = os.stat(path).st_rdev
            return self._in_use(holders_of(os.major(number), os.minor(number)) or ["held by the kernel"])
        reason, exit_code = _REASONS.get(error.errno or 0, (f"cannot be opened: {error.strerror or error}", 1))
        return UserError(f"path: {path} {reason}", exit_code)

    def _in_use(self, holders: Sequence[object]) -> UserError:
        return UserError(f"path: {self} is in use: {'; '.join(map(str, holders))}", _BUSY)

    def _lock(self, deadline: float) -> None:
        while not self._try_to_lock():
            if time.monotonic() >= deadline:
                self._created = None  # whoever has the lock uses it
                raise self._in_use(locks_on(self._fd) or [Holder("lock", "")])
            time.sleep(_STEP)
        if self._created is not None and self._size() > 0:
            self._created = None  # somebody was faster, has used it, and left it

    def _try_to_lock(self) -> bool:
        try:
            if not self.options.read_only:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, *_EVERYTHING))
                return True
            for start, length in _READER_LOCKS:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, start, length))
            answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, *_READER_TESTS))
            if _FLOCK.unpack(answer)[0] == fcntl.F_UNLCK:
                return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"path: {self} cannot be locked ({error.strerror}), so nothing would keep a second writer away; "
                    "use a file system that has locks",
                    6,
                ) from error
        # In nobody's way while we wait.
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, *_EVERYTHING))
        return False

    def _is_at_its_path(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.options.path), os.fstat(self._fd))
        except OSError:
            return False

    def _check_loops(self) -> None:
        """Loop devices take no locks."""
        loops = loops_over(self._fd, writable_only=self.options.read_only)
        if loops:
            raise self._in_use(loops)

    def _check_backing_file(self) -> None:
        """A loop device leads to a file that somebody may have locked."""
        number = os.fstat(self._fd).st_rdev
        try:
            with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/loop/backing_file") as file:
                backing = file.read().rstrip("\n")
            fd = os.open(backing, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return  # no loop device, or over a file that nobody can find
        try:
            mode = fcntl.F_RDLCK if self.options.read_only else fcntl.F_WRLCK
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(mode, *_EVERYTHING))
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                raise self._in_use([f"{backing}, which it is made of, is {holder}" for holder in locks_on(fd)] or [backing])
        finally:
            os.close(fd)

    def _go_direct(self) -> None:
        # Not when opening: open(O_CREAT | O_DIRECT) creates the file even where it then fails.
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError as error:
            raise UserError(f"direct: the file system of {self} cannot go past the page cache; accepted is 0", 6) from error
        self._align = 1
        if self._is_block_device:
            self._align = self._ask(_BLKSSZGET)
        else:
            self._align = statx(self._fd).dio_align or self._queue_number("logical_block_size") or 512

    def _check_size(self) -> None:
        wanted = self.options.size
        if wanted is None:
            return
        size = self._size()
        if size == 0 and not self._is_block_device and not self.options.read_only:
            # New, or left by somebody who was killed right here, perhaps before its name was durable.
            self._grow(wanted)
            self._persist_name()
        elif size != wanted:
            raise UserError(
                f"size: {self} exists and has {size} bytes, not {wanted}; leave it out, and resize the disk afterwards"
            )

    def _persist_name(self) -> None:
        fd = os.open(os.path.dirname(os.path.abspath(self.options.path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _remove_created(self) -> None:
        if self._created is None:
            return
        try:
            if os.path.samestat(os.lstat(self.options.path), self._created):
                os.unlink(self.options.path)
        except FileNotFoundError:
            pass

    def _describe(self) -> BlockInfo:
        options = self.options
        if self._is_block_device:
            logical, physical, optimal = (self._ask(number) for number in (_BLKSSZGET, _BLKPBSZGET, _BLKIOOPT))
            can_discard = self._queue_number("discard_max_bytes") > 0
        else:
            unit = os.fstat(self._fd).st_blksize
            logical = max(512, self._align)
            physical = 4096 if unit % 4096 == 0 else 512
            optimal = unit if unit > physical else 0
            can_discard = not options.read_only and self._can_punch()
        return BlockInfo(
            size=self._size(),
            logical_block_size=logical,
            physical_block_size=physical,
            optimal_io_size=optimal,
            read_only=options.read_only,
            rotational=self._queue_number("rotational") == 1,
            volatile_cache=not options.sync,
            discard=Support.NATIVE if can_discard else Support.NONE,
            write_zeroes=Support.NATIVE,
        )

    def _can_punch(self) -> bool:
        """Tried beyond the end of the file, where there is nothing to lose."""
        try:
            fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, -(-self._size() // 4096) * 4096, 4096)
        except OSError:
            return False
        return True

    def _ask(self, number: int) -> int:
        """An ioctl that answers with an int."""
        return int(struct.unpack("i", fcntl.ioctl(self._fd, number, bytes(4)))[0])

    def _queue_number(self, name: str) -> int:
        """A number from the request queue of the device, for a file of the one its file system is on; 0: none there."""
        found = os.fstat(self._fd)
        device = found.st_rdev if self._is_block_device else found.st_dev
        directory = os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
        for queue in (f"{directory}/queue", f"{os.path.dirname(directory)}/queue"):  # the second: of a partition
            try:
                with open(f"{queue}/{name}", encoding="ascii") as file:
                    return int(file.read())
            except (OSError, ValueError):
                continue
        return 0

    # ------------------------------------------------------------------------------------ requests, on any thread

    def batch(self, batch: Batch) -> None:
        for request in batch:
            call = os.pwritev if request.is_write else os.preadv
            try:
                self._transfer(call, request.offset, batch.memory(request.number))
                batch.results[request.number] = 0
            except OSError as error:
                batch.results[request.number] = error.errno or errno.EIO

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], offset: int, segments: Segments) -> None:
        """Repeat ``call`` (preadv or pwritev) until everything is done."""
        pending = [segment for segment in segments if len(segment)]
        while pending:
            done = self._transfer_some(call, offset, pending)
            # What direct I/O leaves of a block has to be done again.
            done -= done % self._align
            if done <= 0:
                raise OSError(errno.EIO, f"{self} ends or stops at byte {offset}")
            offset += done
            while pending and done >= len(pending[0]):
                done -= len(pending.pop(0))
            if done:
                pending[0] = pending[0][done:]

    def _transfer_some(
        self, call: Callable[[int, list[memoryview], int], int], offset: int, segments: list[memoryview]
    ) -> int:
        if not self.options.direct:
            return call(self._fd, segments[:_PIECES], offset)
        if len(segments) <= _PIECES:
            try:
                return call(self._fd, segments, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        # Addresses or lengths of the pieces do not suit the device: through memory that does.
        length = min(_BOUNCE, sum(map(len, segments)))
        with mmap.mmap(-1, length) as bounce, memoryview(bounce) as view:
            if call is os.pwritev:
                _copy(segments, view, into_segments=False)
            with view[:length] as whole:
                done = call(self._fd, [whole], offset)
            if call is os.preadv:
                with view[:done] as part:
                    _copy(segments, part, into_segments=True)
        return done

    def _flush(self) -> None:
        if not self._lost[0]:
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                # The kernel has marked the pages clean that it could not write: the next fdatasync would succeed. With
                # direct I/O there are such pages, too: of metadata, and where a file system falls back to the page cache.
                self._lost[0] = 1
                raise PermanentError(error.errno, f"{self}: data is lost: {error.strerror}") from error
        if self._lost[0]:  # perhaps meanwhile: of two at once the kernel tells only one
            raise PermanentError(errno.EIO, f"{self}: another flush failed and lost data")

    def _discard(self, offset: int, length: int) -> None:
        if self._is_block_device:
            fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("QQ", offset, length))
        else:
            fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, offset, length)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        for mode in (PUNCH_HOLE, ZERO_RANGE) if unmap else (ZERO_RANGE,):
            if mode in self._refused:
                continue
            try:
                fallocate(self._fd, mode | KEEP_SIZE, offset, length)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._refused.add(mode)
                continue
            if self.options.sync:
                self._flush()  # O_DSYNC is about writes
            return
        raise OSError(errno.EOPNOTSUPP, f"{self} cannot zero ranges")

    def _size(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)

    def _resize(self, size: int) -> None:
        if self._is_block_device:
            found = self._size()
            if found == size:
                return  # its owner has grown it, and nobody has looked since
            raise UserError(
                f"size: {self} is a block device of {found} bytes; grow the device itself, then resize to its size"
            )
        self._grow(size)

    def _grow(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            if error.errno in (errno.EFBIG, errno.EINVAL):
                raise UserError(f"size: the file system of {self} has no files of {size} bytes") from error
            raise UserError(f"size: {self} cannot grow: {error.strerror}", 1) from error
        os.fsync(self._fd)


def _flock(kind: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


def _copy(segments: list[memoryview], buffer: memoryview, *, into_segments: bool) -> None:
    """Between the beginning of the segments and all of the buffer."""
    at = 0
    for segment in segments:
        here = min(len(segment), len(buffer) - at)
        if into_segments:
            segment[:here] = buffer[at : at + here]
        else:
            buffer[at : at + here] = segment[:here]
        at += here
        if at == len(buffer):
            return
