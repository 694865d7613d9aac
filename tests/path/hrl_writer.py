"""Writes a Hyper-V Replica Log, after Microsoft's specification [MS-HRL] and without our library.

usage: hrl_writer.py LOG IMAGE ID PREVIOUS OFFSET:LENGTH:BYTE...
ID and PREVIOUS are numbers; the DataWriteGuid is taken from the VHDX image.
"""

import struct
import sys

log, image, number, previous, *writes = sys.argv[1:]
writes = [tuple(int(part) for part in write.split(":")) for write in writes]


def checksum(data):
    return ~sum(data) & 0xFFFFFFFF


def guid(number):
    return bytes([int(number)]) * 16


def data_write_guid():
    headers = []
    with open(image, "rb") as file:
        for at in (64 << 10, 128 << 10):
            file.seek(at)
            header = file.read(48)
            headers.append((struct.unpack_from("<Q", header, 8)[0], header[32:48]))
    return max(headers)[1]


body = b"".join(bytes([byte]) * length for _, length, byte in writes)
entries = b""
for offset, length, _ in writes:
    before, after = struct.pack("<Q", offset), struct.pack("<IIBIB6x", length, 800_000_000, 1, 0, 0)
    entries += before + struct.pack("<I", checksum(before + after)) + after
block = struct.pack("<QI", 0, len(writes))
block += struct.pack("<I", checksum(block)) + bytes(16) + entries
block += bytes(4096 - len(block))
end = 4096 + len(body) + len(block)
head = struct.pack("<8sII4sIQQ", b"msctlog\0", 0x00020000, 800_000_000, b"ct", 0xA0000, 0, end)
tail = struct.pack("<QiI", end, 0, 4096) + guid(number) + guid(previous)
tail += struct.pack("<IQIH", 800_000_000, len(writes), 0, 0) + data_write_guid()
tail += bytes(4096 - len(head) - 4 - len(tail))
with open(log, "wb") as file:
    file.write(head + struct.pack("<I", checksum(head + tail)) + tail + body + block)
