/* A NOR flash in memory that loses power, and that counts what every byte and sector went through.
 *
 * Programs clear bits only; one that asks for a set bit where a cleared one is leaves the AND, as the chip does, and is
 * counted in `clashes`. The fault plan cuts or fails operations as for a flash image file. A cut in the middle of an erase
 * leaves the first torn_len bytes erased, of a program the first torn_len bytes programmed. */
#ifndef OTA_TESTS_FLASH_EMU_H
#define OTA_TESTS_FLASH_EMU_H

#include "port/port.h"

typedef enum flash_emu_cache {
    FLASH_EMU_NO_CACHE,   /* what was done is on the medium at once, as on a chip */
    FLASH_EMU_LOSES_ALL,  /* a power cut undoes everything since the last sync, as a file's page cache may */
    FLASH_EMU_LOSES_SOME, /* ... undoes every other changed sector, picked by `seed` */
} flash_emu_cache;

typedef struct flash_emu {
    ota_flash flash; /* hand out &emu.flash */
    uint8_t *bytes;
    uint8_t *synced;     /* the medium as of the last sync */
    uint8_t *programmed; /* how often each byte was programmed since the last flash_emu_count_anew */
    uint8_t *erased;     /* how often each sector was erased since then */
    uint64_t clashes;
    uint64_t refused; /* operations outside the flash, or an erase that is not whole sectors: our mistake */
    ota_fault *fault; /* NULL: none */
    flash_emu_cache cache;
    uint32_t seed;
} flash_emu;

/* Every byte 0xFF. Stops the program when there is no memory. */
void flash_emu_init(flash_emu *emu, uint64_t size);
void flash_emu_free(flash_emu *emu);

/* Sets the content, without counting, and calls it synced. */
void flash_emu_load(flash_emu *emu, uint64_t offset, const void *data, size_t len);

/* The power goes between two operations: what the cache holds may be gone. */
void flash_emu_lose_power(flash_emu *emu);

void flash_emu_count_anew(flash_emu *emu);
/* The largest count of any byte, or sector. */
unsigned flash_emu_most_programmed(const flash_emu *emu);
unsigned flash_emu_most_erased(const flash_emu *emu);

#endif
