"""Which requests are fed at the engine's next step, and where their pasts lie: slots and pages. No tensor in sight.

A request has `known` tokens, of which the cache holds `fed`. One with a single unfed token behind others decodes; with
more it is prefilled in chunks. Decoding never waits: a step feeds every request that decodes, and at most
`prefill_tokens` of chunks beside. Once all is fed, the next token is drawn. The plan counts it as known at once, so
that a step can be planned before the tokens of the last one are read; whether one ended a request is learned later.

Requests are admitted in the order of arrival. One that needs a page when none is free takes those of the youngest:
that one is dropped, to be prefilled again, or swapped to host memory, whichever is estimated to be cheaper, and waits
at its place in the order. So the oldest always goes on.

A group's prompt is prefilled once, up to its last token, which every member feeds itself, for its logits. Then the
members in slots take over the state and share the pages; the last page, if it is not full, each copies. If others of
the group wait, the state is held in host memory, and the pages with it, until the last of them has started. What a page
holds of the prompt stays as it is while its first owner goes on behind, so it can be copied at any later time.
"""

from collections import Counter, deque

from .pages import Pages
from .plan import Chunk, Clear, CopyPage, Entry, Forget, Fork, Hold, Load, Move, Place, Plan, Save, Scrub


class Scheduler:
    """`slots` requests at once, with pages of `pool`; `capacity` tokens each at most. `stride`: tokens that a decoding
    request is fed at a step (2 with a draft: then `accept` says what came of it before the next plan).

    `state_bytes`, `page_bytes`, `swap`: bytes of a slot's state and of a page, and how many the host may keep.
    """

    seconds_per_token = 1e-4  # of prefill; the engine measures both
    seconds_per_byte = 1e-10  # of copies to the host and back

    def __init__(
        self,
        slots: int,
        pool: Pages,
        capacity: int,
        prefill_tokens: int,
        *,
        stride: int = 1,
        state_bytes: int = 0,
        page_bytes: int = 0,
        swap: int = 0,
    ):
        self.pool, self.capacity, self.prefill_tokens, self.stride = pool, capacity, prefill_tokens, stride
        self.state_bytes, self.page_bytes, self.swap = state_bytes, page_bytes, swap
        self.running: list[Entry] = []  # in the order of arrival; all have come before those that wait
        self.waiting: deque[Entry] = deque()
        self.holds: dict[int, Hold] = {}
        self.kept = 0  # bytes that the host keeps
        self.counts: Counter[str] = Counter()
        self._slots = list(range(slots - 1, -1, -1))
        self._groups: dict[int, list[Entry]] = {}
        self._arrived = 0
        self._ready: list[Entry] = []  # whose prompts the last plan fed for their groups
        self._moves: list[Move] = []
        self._unclean: set[int] = set()  # pages that may hold what is not finite: of requests that did not end well

    def problem(self, prompt: int, limit: int) -> str | None:
        """Why such a request could never run; None if it can."""
        if limit > self.capacity:
            asked = f"a prompt of {prompt} tokens and a response of up to {limit - prompt}"
            return f"{asked} are more than the {self.capacity} tokens that a request may hold"
        if (need := self.pool.count(limit)) > self.pool.size:
            return f"{limit} tokens take {need} pages, and the cache has {self.pool.size} of {self.pool.page} tokens"
        return None

    def add(self, entry: Entry, saved: int = 0) -> None:
        """A request that waits from now on; the host has `saved` bytes of it, and what of it is fed."""
        entry.saved, self.kept = saved, self.kept + saved
        entry.order, self._arrived = self._arrived, self._arrived + 1
        self.waiting.append(entry)
        self._groups.setdefault(entry.group, []).append(entry)

    def remove(self, entry: Entry, clean: bool = False) -> None:
        """A request that has ended, or is to end; `clean`: what it leaves is known to be finite."""
        if entry.slot is not None:
            self._vacate(entry, clean)
        else:
            self.waiting.remove(entry)
            self._forget(entry)
        members = self._groups[entry.group]
        members.remove(entry)
        if not members:
            del self._groups[entry.group]
        self._let_go(entry.group)

    def accept(self, entry: Entry) -> None:
        """The draft that was fed behind a decoding request's token was right: one more is fed, one more known."""
        entry.fed, entry.known = entry.fed + 1, entry.known + 1
        entry.most = max(entry.most, entry.fed)

    def rebuild(self) -> None:
        """Nothing that was computed counts any more: all requests are prefilled again."""
        for group in list(self.holds):
            self._release(group)
        for entry in self.waiting:
            self._forget(entry)
            entry.fed = 0
        for entry in self.running[::-1]:
            self._drop(entry)

    def plan(self) -> Plan:
        """The next step, which is taken to be done: what follows is planned on top of it."""
        plan, left = Plan(), self.prefill_tokens
        preempted = self.counts["preemptions"]
        self._fork()
        for entry in list(self.running):  # a short way for most of them, which decode within their pages
            fed = entry.fed
            enough = fed + self.stride <= len(entry.pages) * self.pool.page
            if enough and 0 < fed == entry.known - 1 and entry.known < entry.limit and entry.slot is not None:
                plan.decodes.append((entry, fed))
                entry.fed, entry.known, entry.most = fed + 1, fed + 2, max(entry.most, fed + 1)
            else:
                left -= self._feed(entry, plan, left)
        if self.counts["preemptions"] == preempted:
            for entry in self._admit():
                left -= self._feed(entry, plan, left)
        plan.moves, self._moves = self._moves, []
        return plan

    # --- what a step feeds

    def _feed(self, entry: Entry, plan: Plan, left: int) -> int:
        """Plans what a request is fed, with chunks of at most `left` tokens; returns how many of these it took."""
        if entry.slot is None or entry.known >= entry.limit:  # preempted by an older one, or all drawn
            return 0
        if entry.decodes:
            if self._grow(entry, entry.fed + self.stride):
                plan.decodes.append((entry, entry.fed))
                self._fed(entry, entry.known)
            return 0
        leads = self._leader(entry) in (None, entry)
        stop = min(entry.known, entry.fed + left)
        if stop <= entry.fed or entry.fresh and not leads or not self._grow(entry, entry.known):
            return 0
        if leads and entry.fed < entry.shared <= stop and self._followers(entry):
            stop = entry.shared
            self._ready.append(entry)
        start, taken = entry.fed, stop - entry.fed
        plan.chunks.append(Chunk(entry, start, stop, stop == entry.known))
        self.counts["prefilled_tokens"] += taken
        self.counts["refed_tokens"] += max(min(stop, entry.most) - start, 0)
        self._fed(entry, stop)
        return taken

    def _fed(self, entry: Entry, stop: int) -> None:
        entry.known += stop == entry.known
        entry.fed, entry.most = stop, max(entry.most, stop)

    # --- groups

    def _leader(self, entry: Entry) -> Entry | None:
        """The running member that prefills the prompt for the group of `entry`, or has just done so."""
        members = self._groups[entry.group]
        able = [e for e in members if e.slot is not None and (e.fed < e.shared or e in self._ready)]
        return max(able, key=lambda e: e.fed, default=None)  # of equals the first to arrive

    def _followers(self, leader: Entry) -> list[Entry]:
        return [e for e in self._groups[leader.group] if e is not leader and e.fresh]

    def _fork(self) -> None:
        """Hands the prompts that the last plan fed to the members in slots; holds them for those that wait."""
        for leader in self._ready:
            if leader.slot is None or leader.fed != leader.shared:
                continue  # cancelled in between
            followers = self._followers(leader)
            running = [e for e in followers if e.slot is not None]
            if running:
                self._moves.append(Fork(leader.slot, [e.slot for e in running if e.slot is not None]))
            for entry in running:
                self._take_over(entry, leader.pages)
            if len(running) < len(followers) and self.kept + self.state_bytes <= self.swap:
                pages = leader.pages[: self.pool.count(leader.shared)]
                self.pool.share(pages)
                self._moves.append(Save(("group", leader.group), leader.slot, [], leader.fed))
                self.holds[leader.group] = Hold(pages, self.state_bytes)
                self.kept += self.state_bytes
        self._ready = []

    def _take_over(self, entry: Entry, pages: list[int]) -> None:
        """The prompt's full pages, before the pages that an entry in a slot has, and a copy of the one behind."""
        assert entry.slot is not None
        full = entry.shared // self.pool.page
        self.pool.share(pages[:full])
        if entry.shared % self.pool.page:
            self._moves.append(CopyPage(pages[full], entry.pages[0]))
        entry.pages = pages[:full] + entry.pages
        self._moves.append(Place(entry.slot, 0, entry.pages))
        entry.fed = entry.shared
        self.counts["forks"] += 1

    def _let_go(self, group: int) -> None:
        """Releases the group's hold if no member waits for it."""
        if group in self.holds and not any(e.slot is None and e.fresh for e in self._groups.get(group, ())):
            self._release(group)

    def _release(self, group: int) -> None:
        hold = self.holds.pop(group)
        self.pool.drop(hold.pages)
        self.kept -= hold.bytes
        self._moves.append(Forget(("group", group)))

    # --- slots and pages

    def _admit(self) -> list[Entry]:
        """Gives slots, and pages for what is known, to the requests that have waited longest.

        A page stays free for each running request that may need one more, or it would soon be preempted for it (our
        choice).
        """
        admitted: list[Entry] = []
        growing = sum(map(self._may_grow, self.running)) if self.waiting and self._slots else 0
        while self.waiting and self._slots:
            entry = self.waiting[0]
            hold = self.holds.get(entry.group) if entry.fresh else None
            follows = entry.fresh and (hold is not None or self._leader(entry) is not None)
            need = self.pool.count(entry.known) - (entry.shared // self.pool.page if follows else 0)
            if self.pool.free < need + growing:
                if self.running or not self.holds:
                    break
                self._release(next(iter(self.holds)))
                continue
            self.waiting.popleft()
            slot = entry.slot = self._slots.pop()
            self.running.append(entry)
            entry.pages = self._take(need)
            if entry.saved:
                self._moves.append(Load(("request", entry.id), slot, entry.pages[: self.pool.count(entry.fed)]))
                self._forget(entry)
            elif hold is not None:
                self._moves.append(Load(("group", entry.group), slot, []))
                self._take_over(entry, hold.pages)
                self._let_go(entry.group)
            else:
                self._moves.append(Clear(slot))
            if not (follows and hold):
                self._moves.append(Place(slot, 0, list(entry.pages)))
            growing += self._may_grow(entry)
            admitted.append(entry)
        return admitted

    def _may_grow(self, entry: Entry) -> bool:
        return self.pool.count(entry.limit + self.stride - 1) > len(entry.pages)

    def _grow(self, entry: Entry, tokens: int) -> bool:
        """Pages for `tokens` tokens of a running request; False if it is the youngest itself, and there are none."""
        need = self.pool.count(tokens) - len(entry.pages)
        while need > self.pool.free:
            idle = next((g for g, hold in self.holds.items() if self.pool.alone(hold.pages)), None)
            if idle is not None:
                self._release(idle)
                continue
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is entry:
                return False
        if need > 0:
            assert entry.slot is not None
            first, new = len(entry.pages), self._take(need)
            entry.pages += new
            self._moves.append(Place(entry.slot, first, new))
        return True

    def _preempt(self, entry: Entry) -> None:
        assert entry.slot is not None
        pages = entry.pages[: self.pool.count(entry.fed)]
        size = self.state_bytes + len(pages) * self.page_bytes
        cheaper = size > 0 and 2 * size * self.seconds_per_byte < entry.fed * self.seconds_per_token
        self.counts["preemptions"] += 1
        if cheaper and self.kept + size <= self.swap:
            self._moves.append(Save(("request", entry.id), entry.slot, pages, entry.fed))
            entry.saved, self.kept = size, self.kept + size
            self.counts["swaps"] += 1
            self._vacate(entry)
            self.waiting.appendleft(entry)
        else:
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        self._vacate(entry)
        entry.fed = 0
        self.waiting.appendleft(entry)

    def _take(self, count: int) -> list[int]:
        taken = self.pool.take(count)
        if unclean := self._unclean.intersection(taken):
            self._moves.append(Scrub([], sorted(unclean)))
            self._unclean -= unclean
        return taken

    def _vacate(self, entry: Entry, clean: bool = False) -> None:
        assert entry.slot is not None
        if not clean:
            self._unclean.update(entry.pages)
            self._moves.append(Scrub([entry.slot], []))
        self.running.remove(entry)
        self._slots.append(entry.slot)
        self.pool.drop(entry.pages)
        entry.slot, entry.pages = None, []

    def _forget(self, entry: Entry) -> None:
        if entry.saved:
            self._moves.append(Forget(("request", entry.id)))
            self.kept -= entry.saved
            entry.saved = 0
