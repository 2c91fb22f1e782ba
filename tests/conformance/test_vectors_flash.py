"""A whole 2 MB flash of an ESP32-C3, made by esptool from the other vectors."""

from __future__ import annotations

import gzip
import hashlib

from rmaker_ota import ota_core
from rmaker_ota.esp_format import BootConfig, Partition, SlotFacts
from tests.conformance.vectors import VECTORS, description

PATH = VECTORS / "flash" / "esp32c3_2mb.bin.gz"


def test_everything_in_it_is_found() -> None:
    expected = description(PATH)["expected"]
    flash = gzip.decompress(PATH.read_bytes())
    assert len(flash) == expected["unpacked_size"]
    assert hashlib.sha256(flash).hexdigest() == expected["unpacked_sha256"]

    assert ota_core.parse_image(flash[:0x8000], kind="bootloader", chip_id=5, slot_size=0x8000).error is None
    table = ota_core.parse_partition_table(flash[0x8000:0x9000], flash_size=len(flash))
    assert list(table.partitions) == [Partition(**row) for row in expected["partitions"]]
    layout = ota_core.partition_layout(table)
    assert layout.otadata is not None
    assert (layout.factory, layout.test, len(layout.slots)) == (None, None, 2)

    def look(slot: Partition) -> SlotFacts:
        image = ota_core.parse_image(flash[slot.offset : slot.end], kind="app", chip_id=5, slot_size=slot.size)
        return SlotFacts(image.error is None, image.descriptor is not None)

    facts = {slot.label: look(slot) for slot in layout.slots}
    assert [facts["ota_0"].verifies, facts["ota_1"].verifies] == [True, False]
    entries = ota_core.parse_otadata(flash[layout.otadata.offset : layout.otadata.end])
    decision = ota_core.boot_decide(entries, BootConfig(slot_count=2, slots=facts))
    assert decision.slot == expected["boots"]
    assert decision.plan.ops == ()
