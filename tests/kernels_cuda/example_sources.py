"""Sources to compile: the smallest that there is, and any that a test writes."""

from dataclasses import dataclass

from tokenyard_kernels_cuda.sources import sources
from tokenyard_kernels_cuda.toolchain import Source

SPLIT = next(source for source in sources() if source.name == "split.cu")  # the quickest to compile


@dataclass(frozen=True)
class TextSource(Source):
    """A source that a test writes."""

    content: str = ""

    def text(self):
        return self.content
