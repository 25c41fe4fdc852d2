"""Sources to compile: the smallest one of the package, and text that a test writes."""

from dataclasses import dataclass

from tokenyard_kernels_cuda.sources import sources
from tokenyard_kernels_cuda.toolchain import Source

SPLIT = next(source for source in sources() if source.name == "split.cu")  # compiles fastest


@dataclass(frozen=True)
class TextSource(Source):
    """A source whose text a test writes."""

    content: str = ""

    def text(self):
        return self.content
