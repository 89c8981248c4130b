"""The seeds of the fuzz corpus: small programs in the input formats of fuzz_queue.c and fuzz_iova.c.

    python tests/fuzz/seeds.py          writes tests/fuzz/corpus/*/seed-*

``tests/core/test_sanitizers.py`` holds that the corpus has them. What ``run search`` finds worth keeping lies next to them.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
DATA = 3  # block number of the first data region: behind the ring's three areas


class Program:
    """Input of fuzz_queue.c, written down operation by operation. Keep in step with its ``build`` and ``step``."""

    def __init__(
        self,
        *,
        num_log2: int = 4,
        event_idx: bool = True,
        indirect: bool = True,
        resume: bool = False,
        block_log2: int = 9,
        by_target: bool = False,
        null: bool = False,
        small_disk: bool = False,
        read_only: bool = False,
        discard: bool = True,
        write_zeroes: bool = True,
        high: bool = False,
        absent: bool = False,
        seg_max: int = 254,
        avail: int = 0,
        blocks: int = 64,
        max_ranges: int = 8,
        regions: tuple[tuple[int, int], ...] = ((8192, 0), (8192, 0)),
    ) -> None:
        """``regions``: (length, gap and access byte). ``high``: at the very end of the address space."""
        flags = event_idx | indirect << 1 | resume << 2 | (block_log2 - 9) << 3
        flags |= by_target << 5 | null << 6 | small_disk << 7
        flags2 = (7 if read_only else 0) | (not discard) << 3 | (not write_zeroes) << 4 | high << 5 | absent << 6
        self.code = bytearray([flags, flags2, num_log2 - 1, seg_max - 1])
        self.u16(avail)
        self.u8(blocks - 1, max_ranges - 1, len(regions) - 1)
        for length, more in regions:
            self.u16(length - 1)
            self.u8(more)
        self.regions = len(regions)

    def u8(self, *values: int) -> None:
        self.code += bytes(value & 0xFF for value in values)

    def u16(self, value: int) -> None:
        self.code += struct.pack("<H", value & 0xFFFF)

    def address(self, region: int = 0, offset: int = 0) -> None:
        self.u8(DATA + region)
        self.u16(offset)

    def request(
        self,
        kind: int,
        sector: int = 0,
        *,
        size: int = 1,
        buffers: int = 1,
        slot: int = 0,
        at: tuple[int, int] = (0, 0),
        indirect: bool = False,
        table: tuple[int, int] | None = None,
        ranges: tuple[tuple[int, int, int], ...] = ((0, 8, 0),),
        elsewhere: tuple[int, int] | None = None,
    ) -> Program:
        """``size``: sectors per buffer (for ranges: ranges per buffer); ``elsewhere``: where the first buffer lies."""
        reads = kind in (IN, GET_ID)
        self.u8(0, kind, sector)
        self.u8(buffers | indirect << 2 | (table is not None) << 3 | (size & 7) << 4 | reads << 7, slot)
        self.address(*at)
        if table is not None:
            self.address(*table)
        for i in range(buffers):
            if i == 0 and elsewhere is not None:
                self.u8(0)
                self.address(*elsewhere)
            else:
                self.u8(1)
            if kind in (DISCARD, WRITE_ZEROES):
                self.u8(*ranges[i % len(ranges)])
        self.u8(1)
        return self

    def poll(self, room: int = 16) -> Program:
        self.u8(2, room - 1)
        return self

    def batch(self, how: int = 0, *, start: int = 0, blocks: int = 63, results: tuple[int | None, ...] = ()) -> Program:
        """``how``: bits of what is not admitted; the storage has ``blocks`` of 512 bytes from block ``start`` on."""
        self.u8(12, 15, how, start, blocks)
        for result in results:
            self.u8(0 if result is None else 255)
            if result is not None:
                self.code += struct.pack("<i", result)
        return self

    def complete(self, count: int = 1, status: int = 0, *, stranger: int | None = None) -> Program:
        self.u8(4, (count - 1) | status << 6 | (0x20 if stranger is not None else 0), *([0] * count))
        if stranger is not None:
            self.u16(stranger)
        return self

    def descriptor(self, slot: int, region: int, offset: int, length: int, flags: int, following: int = 0) -> Program:
        self.u8(6, slot)
        self.address(region, offset)
        self.u8(0)
        self.u16(length)
        self.u8(flags, following)
        return self

    def head(self, slot: int) -> Program:
        self.u8(7, slot)
        return self

    def poke(self, region: int, offset: int, data: bytes) -> Program:
        self.u8(8)
        self.address(region, offset)
        self.u8(len(data), *data)
        return self

    def table(self, *, toggle: int | None = None) -> Program:
        """A new table; ``toggle``: the block that appears or goes."""
        self.u8(9, toggle is not None, toggle or 0)
        return self

    def capacity(self, blocks: int) -> Program:
        self.u8(10, blocks)
        return self

    def event(self, ahead: int) -> Program:
        """used_event ``ahead`` of used.idx; without EVENT_IDX the flag."""
        self.u8(11, ahead + 2)
        return self


def queue_seeds() -> dict[str, bytes]:
    seeds: dict[str, Program] = {}
    kinds = {"in": IN, "out": OUT, "flush": FLUSH, "id": GET_ID, "discard": DISCARD, "zeroes": WRITE_ZEROES}
    for name, kind in kinds.items():
        buffers = 0 if kind == FLUSH else 2
        for indirect in (False, True):
            way = "indirect" if indirect else "direct"
            program = Program().request(kind, 8, buffers=buffers, indirect=indirect, table=(1, 0) if indirect else None)
            seeds[f"{name}-{way}"] = program.poll().complete().poll()
        for null in (False, True):
            target = Program(by_target=True, null=null, event_idx=null)
            target.request(kind, 8, buffers=buffers).poll().request(kind, 63, buffers=buffers, slot=4).poll()
            seeds[f"{name}-target-{'null' if null else 'memory'}"] = target
    seeds["failed-read"] = Program().request(IN, buffers=2).poll().complete(status=1)
    seeds["failed-target"] = Program(by_target=True, small_disk=True).request(IN, 40).request(OUT, 41, slot=3).poll()
    for how in (0, 1, 2, 4, 8, 16, 32):
        three = Program().request(IN, 8, buffers=2).request(OUT, 16, buffers=2, slot=4).request(FLUSH, slot=8)
        seeds[f"batch-{how}"] = three.batch(how).complete(3)
    seeds["batch-beside"] = Program().request(IN, 8, buffers=2).request(OUT, 16, slot=4).batch(start=9, blocks=7).complete(2)
    seeds["batch-results"] = Program().request(IN, 8).request(OUT, 16, slot=4).batch(results=(5, -7)).complete(2)
    seeds["batch-open"] = Program().request(IN, 8).request(OUT, 16, slot=4).batch(results=(-1, None)).complete(2)
    seeds["read-only"] = Program(read_only=True).request(OUT).request(DISCARD, slot=4).request(IN, slot=8).poll()
    seeds["unsupported"] = Program(discard=False, write_zeroes=False).request(DISCARD).request(WRITE_ZEROES, slot=4).poll()
    seeds["unknown"] = Program().request(99, buffers=0).poll()
    seeds["beyond"] = Program(blocks=8).request(IN, 8).request(OUT, 7, size=2, slot=4).poll()
    seeds["flags"] = Program().request(DISCARD, ranges=((0, 8, 1),)).poll()
    seeds["flags"].request(WRITE_ZEROES, ranges=((0, 8, 2),), slot=4).poll()
    seeds["unaligned"] = Program(block_log2=12).request(IN, 1, size=1).request(DISCARD, ranges=((1, 31, 0),), slot=4).poll()
    seeds["many-ranges"] = Program(max_ranges=1).request(WRITE_ZEROES, buffers=3, size=3).poll()
    crumbs, two = ((4096, 0), (16, 0), (16, 0), (4096, 0)), ((4096, 0), (8192, 0))
    seeds["fragments"] = Program(seg_max=1, regions=crumbs).request(IN, elsewhere=(0, 4000)).poll()
    seeds["straddle"] = Program(regions=two).request(IN, 1, elsewhere=(0, 3900)).poll().complete()
    seeds["header-straddles"] = Program(regions=two).request(OUT, at=(0, 4090)).poll().complete()
    seeds["table-straddles"] = Program(regions=two).request(OUT, indirect=True, table=(0, 4070)).poll().complete()
    seeds["no-access"] = Program(regions=((8192, 1), (8192, 2))).request(IN).request(OUT, at=(1, 0), slot=4).poll()
    far = ((8192, 8), (8192, 12), (8191, 0))
    seeds["high"] = Program(high=True, regions=far).request(OUT, at=(2, 4096)).poll().complete()
    seeds["missing"] = Program(absent=True).request(OUT, elsewhere=(1, 0)).poll().table().poll()
    seeds["found"] = Program(absent=True).request(OUT, elsewhere=(1, 0)).poll().table(toggle=DATA + 1).poll().complete()
    missing_table = Program(absent=True).request(OUT, indirect=True, table=(1, 0)).poll()
    seeds["missing-table"] = missing_table.table().poll().poll()
    seeds["drain"] = Program().request(OUT, at=(1, 0)).poll().table(toggle=DATA).poll().complete().poll()
    seeds["drain-ring"] = Program().request(OUT).poll().table(toggle=0).complete().poll().table(toggle=0).poll()
    seeds["resize"] = Program(blocks=8).request(IN, 9).poll().capacity(16).request(IN, 9, slot=4).poll().capacity(0)
    seeds["broken-lets-go"] = Program().head(0xFF).poll().table(toggle=DATA).poll()
    seeds["stranger"] = Program().request(OUT).poll().complete(1, stranger=7).complete(1)
    seeds["wrap"] = Program(num_log2=1, avail=0xFFFE, indirect=True)
    for i in range(6):
        seeds["wrap"].request(OUT, indirect=True, table=(1, 0), slot=i % 2).event(i % 3 - 1).poll().complete()
    seeds["suppressed"] = Program(event_idx=False).event(-1).request(OUT).poll().complete().event(0)
    seeds["resume"] = Program(resume=True, avail=7).request(OUT).poll().complete()
    seeds["all-at-once"] = Program(num_log2=5)
    for i in range(8):
        seeds["all-at-once"].request(OUT, i, slot=4 * i)
    seeds["all-at-once"].poll(3).complete(2).poll(16).complete(4).complete(4)
    seeds["loop"] = Program().descriptor(0, 0, 0, 16, 1, 1).descriptor(1, 0, 0, 16, 1, 0).head(0).poll().poll()
    seeds["next"] = Program().descriptor(0, 0, 0, 16, 1, 200).head(0).poll()
    seeds["order"] = Program().descriptor(0, 0, 0, 16, 3, 1).descriptor(1, 0, 0, 16, 0).head(0).poll()
    seeds["no-status"] = Program().descriptor(0, 0, 0, 16, 0).head(0).poll()
    seeds["twice"] = Program().request(OUT).head(0).poll()
    inner = struct.pack("<QIHH", 0x100000, 32, 4, 0)
    seeds["nested"] = Program().poke(0, 0, inner).descriptor(0, 0, 0, 16, 4).head(0).poll()
    seeds["ragged"] = Program().descriptor(0, 0, 0, 17, 4).head(0).poll()
    seeds["not-negotiated"] = Program(indirect=False).descriptor(0, 0, 0, 16, 4).head(0).poll()
    tail = Program().poke(1, 0, struct.pack("<QIHH", 0x100200, 1, 2, 0)).poke(0, 0, struct.pack("<IIQ", FLUSH, 0, 0))
    tail.descriptor(0, 0, 0, 16, 1, 1).descriptor(1, 1, 0, 16, 4 | 2)
    seeds["indirect-tail"] = tail.head(0).poll().complete()
    return {f"seed-{name}": bytes(program.code) for name, program in seeds.items()}


def iova_seeds() -> dict[str, bytes]:
    chance = random.Random(1)
    seeds = {}
    for i in range(12):
        regions = i
        code = bytearray([i % 2]) + struct.pack("<HH", 4000, 4096) + bytes([regions])
        for _ in range(regions):
            code += bytes([chance.choice([0, 0, 1, 5]), chance.randrange(64), chance.choice([0xC0, 0xC0, 0xC3, 0x40, 0x80])])
        for _ in range(12):
            code += bytes([chance.randrange(256) & 0xFC]) + struct.pack("<HH", chance.randrange(400), chance.randrange(300))
        code += bytes([3]) + struct.pack("<QQ", 2**64 - 1, 2**64 - 1)
        seeds[f"seed-{i}"] = bytes(code)
    seeds["seed-empty-region"] = bytes([0, 0, 0, 0, 0, 1, 0, 192, 192])
    seeds["seed-host-wraps"] = bytes([0, 0, 0, 0, 0, 1, 2, 9, 255])
    seeds["seed-everything"] = bytes([0, 0, 0, 0, 0, 1, 0, 249, 192])
    return seeds


def inflight_seeds() -> dict[str, bytes]:
    chance = random.Random(2)
    seeds = {}
    for i in range(8):
        code = bytearray([chance.randrange(31)]) + struct.pack("<H", chance.choice([0, 7, 65530])) + bytes([i % 2])
        code += chance.randbytes(600)
        seeds[f"seed-{i}"] = bytes(code)
    steps = bytes([14, 0, 0, 0])
    for head in (3, 1, 7, 5):
        steps += bytes([head, 0])
    steps += bytes([7, 3, 3, 3, 0, 5, 0])  # answered, published, and dead before it is unmarked
    steps += bytes([7, 0, 1, 3, 0, 6, 1, 0, 5, 1])
    seeds["seed-death"] = steps
    return seeds


def main() -> None:
    for target, seeds in (("queue", queue_seeds()), ("iova", iova_seeds()), ("inflight", inflight_seeds())):
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("seed-*"):
            old.unlink()
        for name, code in seeds.items():
            (folder / name).write_bytes(code)


if __name__ == "__main__":
    main()
