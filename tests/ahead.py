"""Cases that are begun before their tests ask for them, some at once: for those that wait, or fill one core of two."""

from contextlib import contextmanager


@contextmanager
def ahead(request, pool, work):
    """{id: the future of work(**parameters)}, of all chosen cases of this module that use the fixture which calls this."""
    own = [item for item in request.session.items if item.module is request.module]
    with pool:
        yield {i.callspec.id: pool.submit(work, **i.callspec.params) for i in own if request.fixturename in i.fixturenames}
        pool.shutdown(cancel_futures=True)
