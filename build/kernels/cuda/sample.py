"""Drawing the next id where the logits are, and setting the next step's inputs.

Of the filters of `runtime.decoding.filters`, temperature and top-k are supported. There is one block. Top-k keeps
every logit that is at least as large as the k-th largest, which four passes find byte by byte (radix selection: a
histogram of the next byte of those whose higher bytes are known). Then each thread sums the weights
exp((x - largest) / temperature) of some consecutive ids. The drawn id is the one at which the running sum, in order
of ids, passes the drawn share of the total. Greedy is k = 1 and a draw of 0.

Bytes per call: the logits once from memory, then once per pass from a cache.
"""

from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cuda.binding import ATTRIBUTES, GPU, WARP, Binding

THREADS = 1024
PARTS = THREADS // WARP  # threads whose results one lane joins
FLOATS = 4  # numbers in 16 bytes
BYTES, BINS = 4, 256  # bytes of a float32; values of a byte
GROUP = BINS // WARP  # bins that one lane joins
SIGN, INFINITE = 0x80000000, 0x7F800000  # bits of a float32
LARGEST, BEST, THRESHOLD, WANTED, SIZE, STATE = range(6)  # places in the block's state, and their number


def sample(vocab_size: int, on: Binding = GPU) -> PrimFunc:
    """Kernel from logits (1, 1, vocab) float32 and options (3,) float32 to the next id and the next step's inputs.

    The options are temperature, top-k (0 for all) and a draw from 0 to 1. The id is written to token (1,) int64 and
    to ids (1, 1) int64, and positions (1, 1) int64 is increased by one. Where a logit is infinite or NaN, token is -1
    and ids is 0.
    """
    select, draw = _select(vocab_size, on), _draw(vocab_size, on)

    @T.prim_func
    def kernel(
        logits_in: T.Buffer((1, 1, vocab_size), "float32"),
        options: T.Buffer((3,), "float32"),
        ids: T.Buffer((1, 1), "int64"),
        positions: T.Buffer((1, 1), "int64"),
        token: T.Buffer((1,), "int64"),
    ):
        T.func_attr(ATTRIBUTES)
        logits = T.decl_buffer((vocab_size,), "float32", data=logits_in.data)
        for _block in on.blocks(1):
            state = T.alloc_buffer((STATE,), "uint32", scope=on.shared)
            select(logits, options, state)
            draw(logits, options, state, ids, positions, token)

    return kernel


def _key(number: Any) -> Any:
    """The bits of a float32, changed so that they sort as the numbers do."""
    bits = T.reinterpret("uint32", number)
    return bits ^ T.if_then_else(bits < T.uint32(SIGN), T.uint32(SIGN), T.uint32(0xFFFFFFFF))


def _rank(number: Any, token_id: Any) -> Any:
    """Sort key that is largest for the first id of the largest logit: the logit's key, then the id in reverse order."""
    return (T.Cast("uint64", _key(number)) << T.uint64(32)) | (T.uint64(0xFFFFFFFF) - T.Cast("uint64", token_id))


def _number(key: Any) -> Any:
    """The float32 that a key stands for."""
    return T.reinterpret("float32", key ^ T.if_then_else(key < T.uint32(SIGN), T.uint32(0xFFFFFFFF), T.uint32(SIGN)))


def _select(vocab_size: int, on: Binding):
    """Inline `select(logits, options, state)`: find the largest logit and the threshold of top-k.

    `state` receives the key and first id of the largest logit, the key of the smallest logit that may be drawn, and
    the bits of the largest absolute value, which tell whether a logit is infinite or NaN.
    """
    count = _counter(on)

    @T.inline
    def measure(logits, ranks, sizes, t):
        rank = T.alloc_buffer((1,), "uint64", scope=on.private)
        size = T.alloc_buffer((1,), "uint64", scope=on.private)
        rank[0] = T.uint64(0)
        size[0] = T.uint64(0)
        for c in T.serial(-(-vocab_size // THREADS)):
            if c * THREADS + t < vocab_size:
                rank[0] = T.max(rank[0], _rank(logits[c * THREADS + t], c * THREADS + t))
                size[0] = T.max(
                    size[0], T.Cast("uint64", T.reinterpret("uint32", logits[c * THREADS + t]) & T.uint32(SIGN - 1))
                )
        ranks[t] = rank[0]
        sizes[t] = size[0]

    @T.inline
    def find_largest(count, value, found):
        found[0] = T.uint64(0)
        for c in T.serial(count):
            found[0] = T.max(found[0], value(c))

    @T.inline
    def join(ranks, sizes, lane_ranks, lane_sizes, t):
        if t < WARP:
            found = T.alloc_buffer((1,), "uint64", scope=on.private)
            find_largest(PARTS, lambda c: ranks[c * WARP + t], found)
            lane_ranks[t] = found[0]
            find_largest(PARTS, lambda c: sizes[c * WARP + t], found)
            lane_sizes[t] = found[0]

    @T.inline
    def begin(options, lane_ranks, lane_sizes, state, t):
        if t == 0:
            found = T.alloc_buffer((1,), "uint64", scope=on.private)
            find_largest(WARP, lambda c: lane_sizes[c], found)
            state[SIZE] = T.Cast("uint32", found[0])
            find_largest(WARP, lambda c: lane_ranks[c], found)
            state[LARGEST] = T.Cast("uint32", found[0] >> T.uint64(32))
            state[BEST] = T.uint32(0xFFFFFFFF) - T.Cast("uint32", found[0] & T.uint64(0xFFFFFFFF))
            state[THRESHOLD] = T.if_then_else(
                options[1] == T.float32(1), T.Cast("uint32", found[0] >> T.uint64(32)), T.uint32(0)
            )
            state[WANTED] = T.Cast("uint32", options[1])

    @T.inline
    def fill(logits, state, bins, byte, t):
        """Count the next byte of the keys that begin like the threshold; `byte` 0 is the first."""
        begins = T.alloc_buffer((1,), "uint32", scope=on.private)
        begins[0] = state[THRESHOLD]
        for c in T.serial(-(-vocab_size // THREADS)):
            if c * THREADS + t < vocab_size:
                rest = _key(logits[c * THREADS + t]) >> T.Cast("uint32", 24 - 8 * byte)
                if (rest >> T.uint32(8)) == begins[0]:
                    count(bins, T.Cast("int32", rest & T.uint32(BINS - 1)))

    @T.inline
    def walk_down(steps, counts, at, wanted):
        """Walk down from `at`, at most `steps` steps, to the first count that reaches `wanted`, less those above it."""
        held = T.alloc_buffer((1,), "int32", scope=on.private)
        walks = T.alloc_buffer((1,), "int32", scope=on.private)
        walks[0] = 1
        for _step in T.serial(steps):
            held[0] = counts[at[0]]
            if held[0] >= wanted[0]:
                walks[0] = 0
            if walks[0] == 1:
                wanted[0] = wanted[0] - held[0]
                at[0] = at[0] - 1

    @T.inline
    def narrow(bins, groups, state, narrowed, t):
        """Find the largest byte at which the counts, summed from the top, reach the number wanted.

        This gives the new threshold and how many are wanted of the keys that begin with it. Both enter the block's
        state one phase later, because TVM puts no barrier inside a condition.
        """
        if t == 0:
            at = T.alloc_buffer((1,), "int32", scope=on.private)
            wanted = T.alloc_buffer((1,), "int32", scope=on.private)
            at[0] = WARP - 1
            wanted[0] = T.Cast("int32", state[WANTED])
            walk_down(WARP - 1, groups, at, wanted)
            at[0] = at[0] * GROUP + GROUP - 1
            walk_down(GROUP - 1, bins, at, wanted)
            narrowed[on.own(t), 0] = (state[THRESHOLD] << T.uint32(8)) | T.Cast("uint32", at[0])
            narrowed[on.own(t), 1] = T.Cast("uint32", wanted[0])

    @T.inline
    def select(logits, options, state):
        ranks = T.alloc_buffer((THREADS,), "uint64", scope=on.shared)
        sizes = T.alloc_buffer((THREADS,), "uint64", scope=on.shared)
        lane_ranks = T.alloc_buffer((WARP,), "uint64", scope=on.shared)
        lane_sizes = T.alloc_buffer((WARP,), "uint64", scope=on.shared)
        bins = T.alloc_buffer((BINS,), "int32", scope=on.shared)
        groups = T.alloc_buffer((WARP,), "int32", scope=on.shared)
        narrowed = T.alloc_buffer((on.copies(THREADS), 2), "uint32", scope=on.private)
        for t in on.threads(THREADS):
            measure(logits, ranks, sizes, t)
        for t in on.threads(THREADS):
            join(ranks, sizes, lane_ranks, lane_sizes, t)
        for t in on.threads(THREADS):
            begin(options, lane_ranks, lane_sizes, state, t)
        for byte in T.serial(
            T.if_then_else(options[1] > T.float32(1) and options[1] < T.float32(vocab_size), BYTES, 0)
        ):
            for t in on.threads(THREADS):
                if t < BINS:
                    bins[t] = 0
            for t in on.threads(THREADS):
                fill(logits, state, bins, byte, t)
            for t in on.threads(THREADS):
                if t < WARP:
                    held = T.alloc_buffer((1,), "int32", scope=on.private)
                    held[0] = 0
                    for c in T.serial(GROUP):
                        held[0] = held[0] + bins[t * GROUP + c]
                    groups[t] = held[0]
            for t in on.threads(THREADS):
                narrow(bins, groups, state, narrowed, t)
            for t in on.threads(THREADS):
                if t == 0:
                    state[THRESHOLD] = narrowed[on.own(t), 0]
                    state[WANTED] = narrowed[on.own(t), 1]

    return select


def _draw(vocab_size: int, on: Binding):
    """Inline `draw`: choose the id among those whose key reaches the threshold, and set the next step's inputs."""
    width = FLOATS if vocab_size % FLOATS == 0 else 1
    loads = -(-vocab_size // (THREADS * width))  # per thread
    each = loads * width  # consecutive ids per thread
    assert each <= THREADS, f"a vocabulary of {vocab_size} ids is too large for one block"

    def weight(number, options, state):
        share = T.exp((number - _number(state[LARGEST])) / options[0])
        return T.if_then_else(_key(number) >= state[THRESHOLD], share, T.float32(0))

    @T.inline
    def sum_weights(logits_in, options, state, masses, count, t):
        logits = T.decl_buffer((vocab_size // width, width), "float32", data=logits_in.data)
        mass = T.alloc_buffer((1,), "float32", scope=on.private)
        mass[0] = T.float32(0)
        for c in T.serial(count):
            if t * loads + c < vocab_size // width:
                some = T.alloc_buffer((width,), "float32", scope=on.private)
                for v in T.vectorized(width):
                    some[v] = logits[t * loads + c, v]
                for v in on.unroll(width):
                    mass[0] = mass[0] + weight(some[v], options, state)
        masses[t] = mass[0]

    @T.inline
    def walk(count, part, at, below, goal, t):
        """Find the first part at which the sum, from `below` on, passes `goal`, or else the last non-empty part.

        Set `at` to that part and `below` to the sum before it.
        """
        found = T.alloc_buffer((1,), "int32", scope=on.private)
        upto = T.alloc_buffer((1,), "float32", scope=on.private)
        held = T.alloc_buffer((1,), "float32", scope=on.private)
        found[0] = 0
        upto[0] = below[on.own(t)]
        at[on.own(t)] = 0
        for i in T.serial(count):
            held[0] = part(i)
            if (found[0] == 0 or upto[0] <= goal[on.own(t)]) and held[0] > T.float32(0):
                found[0] = 1
                at[on.own(t)] = i
                below[on.own(t)] = upto[0]
                upto[0] = upto[0] + held[0]

    @T.inline
    def choose_thread(options, masses, sums, first, at, below, goal, t):
        """Set first[0] to the first id of the thread among whose ids the sum passes the goal."""
        if t == 0:
            below[on.own(t)] = T.float32(0)
            goal[on.own(t)] = T.float32(0)
            for lane in T.serial(WARP):
                goal[on.own(t)] = goal[on.own(t)] + sums[lane]
            goal[on.own(t)] = goal[on.own(t)] * options[2]
            walk(WARP, lambda i: sums[i], at, below, goal, t)
            lane_first = at[on.own(t)] * PARTS
            walk(PARTS, lambda i: masses[lane_first + i], at, below, goal, t)
            first[0] = (lane_first + at[on.own(t)]) * each

    @T.inline
    def choose(is_greedy, state, weights, first, at, below, goal, ids, positions, token, t):
        if t == 0:
            walk(each, lambda i: weights[i], at, below, goal, t)
            drawn = T.if_then_else(is_greedy, T.Cast("int32", state[BEST]), first[0] + at[on.own(t)])
            token[0] = T.if_then_else(state[SIZE] < T.uint32(INFINITE), T.Cast("int64", drawn), T.int64(-1))
            ids[0, 0] = T.max(token[0], T.int64(0))
            positions[0, 0] = positions[0, 0] + T.int64(1)

    @T.inline
    def draw(logits, options, state, ids, positions, token):
        masses = T.alloc_buffer((THREADS,), "float32", scope=on.shared)
        sums = T.alloc_buffer((WARP,), "float32", scope=on.shared)
        weights = T.alloc_buffer((each,), "float32", scope=on.shared)
        first = T.alloc_buffer((1,), "int32", scope=on.shared)
        at = T.alloc_buffer((on.copies(THREADS),), "int32", scope=on.private)
        below = T.alloc_buffer((on.copies(THREADS),), "float32", scope=on.private)
        goal = T.alloc_buffer((on.copies(THREADS),), "float32", scope=on.private)
        is_greedy = options[1] == T.float32(1) and options[2] == T.float32(0)  # its id is already known
        for t in on.threads(THREADS):
            sum_weights(logits, options, state, masses, T.if_then_else(is_greedy, 0, loads), t)
        for t in on.threads(THREADS):
            if t < WARP:
                total = T.alloc_buffer((1,), "float32", scope=on.private)
                total[0] = T.float32(0)
                for c in T.serial(PARTS):
                    total[0] = total[0] + masses[t * PARTS + c]
                sums[t] = total[0]
        for t in on.threads(THREADS):
            choose_thread(options, masses, sums, first, at, below, goal, t)
        for t in on.threads(THREADS):
            if t < each:
                own = T.alloc_buffer((1,), "int32", scope=on.private)
                own[0] = first[0] + t
                weights[t] = T.float32(0)
                if own[0] < vocab_size:  # an `if`: within an expression, TVM loads ahead of the condition
                    weights[t] = weight(logits[own[0]], options, state)
        for t in on.threads(THREADS):
            choose(is_greedy, state, weights, first, at, below, goal, ids, positions, token, t)

    return draw


def _counter(on: Binding):
    """Inline `count(bins, i)`: bins[i] += 1, by many threads at once."""

    @T.inline
    def count(bins, i):
        T.evaluate(T.cuda.atomic_add(T.address_of(bins[i]), T.int32(1)))

    @T.inline
    def count_serially(bins, i):
        bins[i] = bins[i] + 1

    return count_serially if on.serial else count
