"""Keys of a selection, and the sources that they come from.

A key is an unsigned integer that sorts like the value. Keys come in tiles from a source, an object with two inline
functions: ``fetch(t)`` asks for tile t, and ``take(t, key)`` puts this thread's keys of it into registers once they
have come, 0 where there are none. Between the two lies the work on the tile before.
"""

from __future__ import annotations

from tvm.script import tirx as T

from ..emit import call


def key_of(bits):
    """A uint32 that sorts like the f32 with these bits, with -0 equal to +0. Only NaN gives 0."""
    flip = T.reinterpret("uint32", T.reinterpret("int32", bits) >> 31) | T.uint32(0x80000000)
    magnitude = bits & T.uint32(0x7FFFFFFF)
    number = T.Select(magnitude == T.uint32(0), T.uint32(0x80000000), bits ^ flip)
    return T.Select(magnitude > T.uint32(0x7F800000), T.uint32(0), number)


def value_of(key):
    """The f32 whose key is `key`; not for 0."""
    flip = T.Select(key >= T.uint32(0x80000000), T.uint32(0x80000000), T.uint32(0xFFFFFFFF))
    return T.reinterpret("float32", key ^ flip)


@T.meta_class
class ListKeys:
    """The first `used` keys of a list in shared memory, which the user sets.

    The list is at a boundary of 16 bytes and as long as whole quads are: four loads of 4 bytes would take turns at the
    same banks.
    """

    def __init__(self, selector, keys) -> None:
        self.selector = selector
        self.keys = keys
        self.used = T.local_scalar("int32")
        self.quad = T.alloc_local((4,), "uint32")

    @T.inline
    def fetch(self, t):
        pass

    @T.inline
    def take(self, t, key):
        for u in T.unroll(self.selector.quads):
            at: T.let = t * self.selector.tile + (u * self.selector.threads + self.selector.tx) * 4
            for e in T.unroll(4):
                self.quad[e] = T.uint32(0)
            if at < self.used:
                T.evaluate(call("get_4x32", T.address_of(self.quad[0]), T.address_of(self.keys[at]), dtype="void"))
            for e in T.unroll(4):
                key[u * 4 + e] = T.Select(at + e < self.used, self.quad[e], T.uint32(0))


@T.meta_class
class RowKeys:
    """The keys of the f32 at `base` from `start` to `stop`. Position 0 is `origin`, a boundary of 16 bytes."""

    def __init__(self, selector, base, start, stop, origin) -> None:
        self.selector = selector
        self.base, self.start, self.stop, self.origin = base, start, stop, origin
        self.quad = T.alloc_local((selector.quads, 4), "uint32")

    @T.inline
    def load(self, u, at):
        to: T.let = T.address_of(self.quad[u, 0])
        T.evaluate(call("load_row4", to, self.base, self.origin + at, self.start, self.stop, dtype="void"))

    @T.inline
    def fetch(self, t):
        for u in T.unroll(self.selector.quads):
            position: T.let = (u * self.selector.threads + self.selector.tx) * 4
            self.load(u, T.Cast("int64", t) * self.selector.tile + position)

    @T.inline
    def take(self, t, key):
        for u in T.unroll(self.selector.quads):
            for e in T.unroll(4):
                key[u * 4 + e] = key_of(self.quad[u, e])
