"""The scheduler against a simulated device, which knows what every page and slot really holds."""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amalgam.rl.pages import Pages
from amalgam.rl.plan import Clear, CopyPage, Entry, Forget, Fork, Load, Place, Save, Scrub
from amalgam.rl.scheduler import Scheduler

NOTHING: tuple = ("nothing",)


def token(entry: Entry, position: int) -> tuple:
    """What stands for a token: members of a group share those of the prompt."""
    return ("group", entry.group, position) if position < entry.prompt else ("request", entry.id, position)


@dataclass
class Device:
    """Pages of tokens, a table, and of each slot the tokens that its state was computed from."""

    page: int
    pages: dict[int, list[tuple]] = field(default_factory=dict)
    table: dict[tuple[int, int], int] = field(default_factory=dict)
    states: dict[int, list[tuple]] = field(default_factory=dict)
    host: dict[tuple, tuple[list[tuple], list[list[tuple]]]] = field(default_factory=dict)

    def move(self, move) -> None:
        match move:
            case Clear(slot):
                self.states[slot] = []
            case Place(slot, first, pages):
                self.table |= {(slot, first + i): page for i, page in enumerate(pages)}
            case Fork(source, targets):
                for slot in targets:
                    self.states[slot] = list(self.states[source])
            case CopyPage(source, target):
                self.pages[target] = list(self.of(source))
            case Scrub(slots, pages):
                self.states |= dict.fromkeys(slots, [])
                self.pages |= {page: [NOTHING] * self.page for page in pages}
            case Save(key, slot, pages, length):
                assert len(self.states[slot]) == length
                self.host[key] = list(self.states[slot]), [list(self.of(page)) for page in pages]
            case Load(key, slot, pages):
                state, contents = self.host[key]
                self.states[slot] = list(state)
                self.pages |= {page: list(content) for page, content in zip(pages, contents, strict=True)}
            case Forget(key):
                del self.host[key]

    def of(self, page: int) -> list[tuple]:
        return self.pages.setdefault(page, [NOTHING] * self.page)

    def feed(self, entry: Entry, start: int, stop: int) -> None:
        """Checks that the cache holds exactly the tokens before, and writes more."""
        slot, past = entry.slot, [token(entry, p) for p in range(start)]
        assert slot is not None
        assert self.states[slot] == past, f"{entry} stands behind other tokens"
        assert [self.of(self.table[slot, p // self.page])[p % self.page] for p in range(start)] == past
        for p in range(start, stop):
            page = self.table[slot, p // self.page]
            assert page > 0
            self.of(page)[p % self.page] = token(entry, p)
        self.states[slot] = [token(entry, p) for p in range(stop)]


def check_books(s: Scheduler) -> None:
    """Every page is free or held as often as it is counted, and nothing is in two places."""
    held = Counter(page for e in s.running for page in e.pages)
    held.update(page for hold in s.holds.values() for page in hold.pages)
    assert s.pool._holders == [0, *(held[page] for page in range(1, s.pool.size + 1))]
    assert sorted(s.pool._free + list(held)) == list(range(1, s.pool.size + 1))
    slots = [e.slot for e in s.running] + s._slots
    assert len(set(slots)) == len(slots) and None not in slots
    assert [e.order for e in [*s.running, *s.waiting]] == sorted(e.order for e in [*s.running, *s.waiting])
    assert all(e.slot is None and not e.pages for e in s.waiting)
    assert 0 <= s.kept <= s.swap
    assert s.kept == sum(e.saved for e in s.waiting) + sum(hold.bytes for hold in s.holds.values())
    for group in s.holds:
        assert any(e.fed == 0 for e in s.waiting if e.group == group), "a hold that nobody waits for"


def run_step(s: Scheduler, device: Device) -> list[Entry]:
    """One planned step; returns the entries that were fed."""
    before = {e.id: e.known for e in [*s.running, *s.waiting]}
    started = [e for e in s.running if e.fed]
    plan = s.plan()
    # One that gives way may have a token in flight, which its prefill will need.
    assert not any(c.start == 0 and c.entry in started for c in plan.chunks)
    saved = [(i, move.key) for i, move in enumerate(plan.moves) if isinstance(move, Save) and move.key[0] == "request"]
    assert not any(isinstance(move, Load) and move.key == key for i, key in saved for move in plan.moves[i:])
    for move in plan.moves:
        device.move(move)
    fed = [c.entry for c in plan.chunks] + [e for e, _ in plan.decodes]
    assert len(set(map(id, fed))) == len(fed), "a request is fed once a step"
    assert sum(c.stop - c.start for c in plan.chunks) <= s.prefill_tokens
    for entry, start in plan.decodes:
        assert (
            entry.slot is not None
            and start == before[entry.id] - 1
            and entry.known == before[entry.id] + 1 <= entry.limit
        )
        device.feed(entry, start, start + s.stride)
        device.states[entry.slot] = device.states[entry.slot][: start + 1]  # the draft is taken back
    for entry, start, stop, draws in plan.chunks:
        assert start < stop <= before[entry.id]
        assert draws == (stop == before[entry.id]) == (entry.known > before[entry.id])
        device.feed(entry, start, stop)
    for e in s.running:
        due = e.known < e.limit and e.decodes and e.id in before and e not in fed
        assert not due or e.fed == e.shared, "a request that decodes was left out"  # it has just been admitted
    check_books(s)
    return fed


@dataclass
class Load_:
    """A random run: requests arrive, end, are cancelled and rebuilt."""

    seed: int
    slots: int
    pool: int
    page: int
    budget: int
    swap: int
    stride: int


loads = st.builds(
    Load_,
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.integers(4, 14),
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([0, 60, 10**6]),
    st.sampled_from([1, 2]),
)


@settings(max_examples=250, deadline=None)
@given(loads)
def test_what_is_fed_stands_behind_its_own_past(load: Load_):
    rng = random.Random(load.seed)
    pool = Pages(load.pool, load.page)
    capacity = load.pool * load.page
    s = Scheduler(
        load.slots, pool, capacity, load.budget, stride=load.stride, state_bytes=10, page_bytes=7, swap=load.swap
    )
    s.seconds_per_byte = rng.choice([0.0, 1e-6, 1.0])
    device, live, ends, number = Device(load.page), [], {}, 0
    prompts = {group: rng.randint(1, max(capacity // 2, 1)) for group in range(5)}
    for step in range(60):
        if step < 30 and rng.random() < 0.5:
            group = rng.randrange(5)
            for _ in range(rng.randint(1, 4)):
                prompt, new = prompts[group], rng.randint(1, 12)
                past = rng.choice([0, 0, rng.randrange(new)])
                if s.problem(prompt, prompt + new):
                    continue
                entry = Entry(number, group, prompt, prompt + past, prompt + new)
                ends[number], number = rng.randint(past + 1, new), number + 1
                live.append(entry)
                s.add(entry)
        if rng.random() < 0.03:
            s.rebuild()
            device.pages.clear()
        run_step(s, device)
        for entry in [e for e in live if e.known >= e.prompt + ends[e.id] or rng.random() < 0.02]:
            live.remove(entry)
            s.remove(entry)
            check_books(s)
    for _ in range(3000):  # all end, the oldest first to get what it needs
        if not live:
            break
        oldest = min(live, key=lambda e: e.order)
        fed = run_step(s, device)
        assert oldest in fed or oldest.known >= oldest.limit or any(e.group == oldest.group for e in fed)
        for entry in [e for e in live if e.known >= e.prompt + ends[e.id]]:
            live.remove(entry)
            s.remove(entry)
    assert not live and pool.free == pool.size and not s.holds and s.kept == 0
    s.plan()
    assert not s._groups and len(s._slots) == load.slots


def drained(s: Scheduler, entries: list[Entry], page: int) -> list[int]:
    """Runs all entries to their limits; how many are fed at each step."""
    device, sizes = Device(page), []
    for entry in entries:
        s.add(entry)
    while s.running or s.waiting:
        sizes.append(len(run_step(s, device)))
        for e in [e for e in s.running if e.known >= e.limit]:
            s.remove(e)
    return sizes


def test_a_groups_prompt_is_prefilled_once():
    """With room for all, and with slots for three: the others find it in host memory."""
    for slots in (16, 3):
        s = Scheduler(slots, Pages(400, 4), 400, 64, state_bytes=1, page_bytes=1, swap=100)
        drained(s, [Entry(i, 0, 42, 42, 52) for i in range(16)], 4)
        assert s.counts["forks"] == 15
        assert s.counts["prefilled_tokens"] == 41, "what comes behind, each decodes"


def test_without_memory_for_it_a_prompt_is_prefilled_again():
    s = Scheduler(3, Pages(400, 4), 400, 64, state_bytes=1, swap=0)
    drained(s, [Entry(i, 0, 42, 42, 52) for i in range(9)], 4)
    assert s.counts["prefilled_tokens"] == 3 * 41
    assert s.counts["forks"] == 6


def test_forks_share_the_prompts_full_pages():
    s = Scheduler(8, Pages(40, 4), 100, 64)
    device = Device(4)
    for i in range(8):
        s.add(Entry(i, 0, 22, 22, 30))
    for _ in range(2):
        run_step(s, device)
    assert len({tuple(e.pages[:5]) for e in s.running}) == 1  # 21 tokens fill 5 pages
    assert s.pool.size - s.pool.free == 5 + 8


def test_decoding_does_not_wait_for_a_long_prompt():
    s = Scheduler(4, Pages(100, 4), 400, 8)
    device = Device(4)
    short, long = Entry(0, 0, 3, 3, 60), Entry(1, 1, 200, 200, 210)
    s.add(short)
    run_step(s, device)
    s.add(long)
    for _ in range(25):
        fed = run_step(s, device)
        assert short in fed and long in fed
    assert long.fed == 200


@pytest.mark.parametrize(("seconds_per_byte", "swaps"), [(0.0, True), (1.0, False)])
def test_the_youngest_gives_way_and_the_cheaper_way_is_taken(seconds_per_byte: float, swaps: bool):
    s = Scheduler(4, Pages(12, 4), 48, 64, state_bytes=8, page_bytes=4, swap=1000)
    s.seconds_per_byte = seconds_per_byte
    entries = [Entry(i, i, 9, 9, 40) for i in range(4)]
    device, order = Device(4), []
    for entry in entries:
        s.add(entry)
    while s.running or s.waiting:
        run_step(s, device)
        for e in [e for e in s.running if e.known >= e.limit]:
            s.remove(e)
            order.append(e.id)
    assert order == [0, 1, 2, 3]
    assert s.counts["preemptions"] > 0
    assert s.counts["swaps"] == (s.counts["preemptions"] if swaps else 0)
    assert (s.counts["refed_tokens"] == 0) == swaps


def test_one_that_gave_way_waits_for_the_next_step():
    """Its last token may be in flight, and a prefill needs it."""
    s, device = Scheduler(4, Pages(12, 4), 48, 64), Device(4)
    entry = Entry(0, 0, 9, 9, 40)
    s.add(entry)
    for _ in range(3):
        run_step(s, device)
    fork, s._fork = s._fork, lambda: s._preempt(entry)  # as a plan begins
    assert run_step(s, device) == [] and s.waiting[0] is entry
    s._fork = fork
    assert run_step(s, device) == [entry] and entry.fed == 12


def test_what_can_never_run_is_named():
    s = Scheduler(4, Pages(10, 4), 30, 8)
    assert s.problem(20, 30) is None
    assert "prompt of 25 tokens and a response of up to 6 are more than the 30" in str(s.problem(25, 31))
    s = Scheduler(4, Pages(5, 4), 30, 8)
    assert s.problem(1, 25) == "25 tokens take 7 pages, and the cache has 5 of 4 tokens"


def test_pages_are_counted():
    pool = Pages(3, 4)
    a, b = pool.take(2)
    pool.share([a])
    pool.drop([a, b])
    assert pool.free == 2
    with pytest.raises(ValueError, match="3 pages asked for, 2 of 3 are free"):
        pool.take(3)
    with pytest.raises(ValueError, match=f"page {b} is free already"):
        pool.drop([b])
    with pytest.raises(ValueError, match=f"page {b} is free and cannot be shared"):
        pool.share([b])
    assert [pool.count(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


@pytest.mark.parametrize("stride", [1, 2])
def test_all_slots_are_used_where_there_are_pages_for_all(stride: int):
    """No page waits for requests that have all they may need."""
    s = Scheduler(4, Pages(4, 16), 16, 100, stride=stride)
    for i in range(4):
        s.add(Entry(i, i, 5, 5, 16 - stride + 1))
    s.plan()
    assert len(s.running) == 4 and s.pool.free == 0
