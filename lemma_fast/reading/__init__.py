"""From a photograph to text: lines are found, straightened, and read before and after the network.

    photograph -> quads of lines -> straight strips -> words -> the network -> the surer reading

`Reader` does all of it; `enlarge` writes the words that the network made back into the photograph.
"""

from lemma_fast.reading.detect import Detector, RapidDetector
from lemma_fast.reading.lines import LineRecognizer
from lemma_fast.reading.page import Line, Page, Word
from lemma_fast.reading.reader import Reader

__all__ = ["Detector", "Line", "LineRecognizer", "Page", "RapidDetector", "Reader", "Word"]
