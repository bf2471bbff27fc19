"""A plan run by threads, a thread a rank, with nothing to compute. It knows nothing of `check`: it ends, or it does not."""

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor


class Stuck(Exception):
    pass


def runs(plan, pool: ThreadPoolExecutor, rendezvous=False):
    """Whether it runs to its end. `rendezvous`: a send waits until it is received. The pool needs a thread a rank."""
    job = Threads(plan, rendezvous)
    done = [pool.submit(job.rank, rank) for rank in range(len(plan.ranks))]
    ended = [d.result() for d in done]
    return all(ended)


class Threads:
    """A rank that waits is asleep until another's move wakes it. When all are asleep or have ended, no move is left."""

    def __init__(self, plan, rendezvous):
        self.plan, self.rendezvous = plan, rendezvous
        self.ranks = range(len(plan.ranks))
        self.queues = {(a, b): deque() for a in self.ranks for b in self.ranks}
        lock = threading.RLock()
        self.turn = [threading.Condition(lock) for _ in self.ranks]
        self.asleep, self.ended, self.stuck = set(), 0, False

    def rank(self, rank):
        order = {a: iter(self.plan.sent(a, rank)) for a in self.ranks}
        inbox, done = set(), set()
        try:
            for op in self.plan.ranks[rank]:
                with self.turn[rank]:
                    self.do(rank, op, order, inbox, done)
        except Stuck:
            return False
        except BaseException:
            with self.turn[rank]:
                self.end()
            raise
        with self.turn[rank]:
            assert not inbox, "what was sent and not needed"
            self.ended += 1
            self.look()
        return True

    def do(self, rank, op, order, inbox, done):
        own = {"I": "F", "B": "F", "W": "I"}.get(op.kind)
        if own and op._replace(kind=own) not in done:
            self.stop()
        need = self.plan.needs(op)
        if need is not None and self.plan.place[need] == rank:
            if need not in done:
                self.stop()
        elif need is not None:
            source = self.plan.place[need]
            while need not in inbox:
                came = self.receive(source, rank)
                assert came == next(order[source]), "both know what comes next"
                inbox.add(came)
            inbox.remove(need)
        done.add(op)
        target = self.plan.to(op)
        if target not in (None, rank):
            self.queues[rank, target].append(op)
            self.wake(target)
            while self.rendezvous and op in self.queues[rank, target]:
                self.sleep(rank)

    def receive(self, source, rank):
        while not self.queues[source, rank]:
            self.sleep(rank)
        came = self.queues[source, rank].popleft()
        self.wake(source)
        return came

    def sleep(self, rank):
        self.asleep.add(rank)
        self.look()
        while rank in self.asleep and not self.stuck:
            self.turn[rank].wait()
        if self.stuck:
            raise Stuck

    def wake(self, rank):
        if rank in self.asleep:
            self.asleep.remove(rank)
            self.turn[rank].notify()

    def look(self):
        if self.asleep and len(self.asleep) + self.ended == len(self.ranks):
            self.end()

    def stop(self):
        self.end()
        raise Stuck

    def end(self):
        self.stuck = True
        for turn in self.turn:
            turn.notify_all()
