"""Writers of published files in miniature, and a server that can break off."""

import gzip
import io
import struct
import tarfile
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


def tar(path, members, mode="w:gz"):
    """A tar file of {name: bytes or TarInfo}."""
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


class Pickle:
    """The opcodes with which Python 2 pickled a frame of pandas 0.20."""

    @staticmethod
    def name(module, name):
        return f"c{module}\n{name}\n".encode()

    @staticmethod
    def text(text):
        return b"U" + bytes([len(text)]) + text.encode()

    @staticmethod
    def number(number):
        return b"J" + struct.pack("<i", number)

    @staticmethod
    def group(*parts):
        return b"(" + b"".join(parts) + b"t"

    @staticmethod
    def mapping(**items):
        return b"}(" + b"".join(Pickle.text(k) + v for k, v in items.items()) + b"u"

    @classmethod
    def array(cls, array):
        made = cls.name("numpy.core.multiarray", "_reconstruct") + cls.group(
            cls.name("numpy", "ndarray"), cls.group(cls.number(0)), cls.text("b")
        )
        kind = "O8" if array.dtype == object else array.dtype.str[1:]
        dtype = cls.name("numpy", "dtype") + cls.group(
            cls.text(kind), cls.number(0), cls.number(1)
        ) + b"R" + cls.group(
            cls.number(3), cls.text("|" if kind == "O8" else "<"), b"NNN",
            cls.number(-1), cls.number(-1), cls.number(63 if kind == "O8" else 0),
        ) + b"b"  # fmt: skip
        if array.dtype == object:
            raw = b"](" + b"".join(map(cls.text, array)) + b"e"
        else:
            content = array.tobytes()
            raw = b"T" + struct.pack("<i", len(content)) + content
        shape = cls.group(*map(cls.number, array.shape))
        return made + b"R" + cls.group(cls.number(1), shape, dtype, b"\x89", raw) + b"b"

    @classmethod
    def index(cls, kind, data):
        return cls.name("pandas.core.indexes.base", "_new_Index") + cls.group(
            cls.name("pandas.core.indexes.base", kind), cls.mapping(data=data, name=b"N")
        ) + b"R"  # fmt: skip

    @classmethod
    def frame(cls, blocks, names):
        """``blocks``: (positions or slice, values (columns, rows)) each."""
        axes = b"](" + cls.index("Index", cls.array(np.array(names, object)))
        axes += cls.index("Int64Index", cls.array(np.arange(blocks[0][1].shape[1]))) + b"e"
        listed = b"]("
        for places, values in blocks:
            if isinstance(places, slice):
                where = cls.name("__builtin__", "slice") + cls.group(
                    *map(cls.number, (places.start, places.stop, places.step or 1))
                ) + b"R"  # fmt: skip
            else:
                where = cls.array(np.array(places))
            listed += cls.mapping(values=cls.array(values), mgr_locs=where)
        state = cls.group(
            axes, b"]", b"]",
            b"}(" + cls.text("0.14.1") + cls.mapping(axes=axes, blocks=listed + b"e") + b"u",
        )  # fmt: skip
        manager = cls.name("pandas.core.internals", "BlockManager") + b")\x81" + state + b"b"
        made = cls.name("pandas.core.frame", "DataFrame") + b")\x81"
        return b"\x80\x02" + made + cls.mapping(_data=manager, _typ=cls.text("dataframe")) + b"b."


class _Handler(SimpleHTTPRequestHandler):
    """Files of a folder; ``ranges``: answer requests for a rest; ``cut``: bytes until it breaks."""

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        try:
            with open(self.translate_path(self.path), "rb") as file:
                content = file.read()
        except OSError:
            self.send_error(404)
            return
        start, size = 0, len(content)
        if server.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= size:
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        stop = size if server.cut is None else min(start + server.cut, size)
        self.wfile.write(content[start:stop])

    def log_message(self, *_):
        pass


@contextmanager
def served(folder, ranges=True):
    """A server on this machine; its attributes ``url``, ``asked``, ``cut`` and ``ranges``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.asked, server.cut, server.ranges = [], None, ranges
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
