"""BlockManager: which request owns which page of the cache. Pure Python."""

from collections import deque

from minidsv.kernels.constants import PAGE_SIZE
from minidsv.request import Request


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_SIZE)


class BlockManager:
    """Hands out pages 0..num_pages-1; a page has one owner or is free."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = deque(range(num_pages))
        self._owners: dict[int, Request] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give `request` pages for `num_tokens` tokens; False, and nothing changed, if too few."""
        missing = pages_for(num_tokens) - len(request.page_ids)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page = self._free.popleft()
            self._owners[page] = request
            request.page_ids.append(page)
        return True

    def free(self, request: Request) -> None:
        """Take back every page of `request`."""
        for page in request.page_ids:
            del self._owners[page]
        self._free.extend(request.page_ids)
        request.page_ids.clear()

    def check(self) -> None:
        """Assert that every page is free or owned once, by the request that lists it."""
        owned = list(self._owners)
        assert sorted([*self._free, *owned]) == list(range(self.num_pages)), (
            "a page is lost or owned twice"
        )
        for page, request in self._owners.items():
            assert request.page_ids.count(page) == 1, (
                f"page {page} is not listed once by {request.request_id}"
            )
        listed = sum(len(r.page_ids) for r in set(self._owners.values()))
        assert listed == len(owned), "a request lists a page that it does not own"
