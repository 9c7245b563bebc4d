"""Scalars for TensorBoard: its file format, written without packages that load a PyTorch if there is one.

A file is a sequence of records (length, checksum, data, checksum: TFRecord), each a protocol buffer `Event`
(tensorflow/core/util/event.proto): field 1 the time, 2 the step, 3 the version, 5 the summary, 7 the session's log.
"""

import os
import socket
import struct
import time

from etils import epath


class EventFile:
    """A new file in a folder, to which scalars are added."""

    def __init__(self, folder: epath.PathLike, *, purge_step: int | None = None) -> None:
        """`purge_step`: from there on, points of earlier files are not shown any more.

        Raises:
            OSError: the folder or the file can't be made.
        """
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._write(0, _bytes(3, b"brain.Event:2"))
        if purge_step is not None:
            self._write(purge_step, _bytes(7, _number(1, 1)))  # a session starts

    def add(self, name: str, value: float, step: int) -> None:
        """A point of the curve `name`."""
        scalar = _bytes(1, name.encode()) + b"\x15" + struct.pack("<f", value)
        self._write(step, _bytes(5, _bytes(1, scalar)))

    def flush(self) -> None:
        """What was added can be seen."""
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _write(self, step: int, what: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + _number(2, step) + what
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC = [_crc_of_byte(byte) for byte in range(256)]  # CRC-32C, Castagnoli's polynomial


def _checksum(data: bytes) -> bytes:
    """CRC-32C, masked as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
