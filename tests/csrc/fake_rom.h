/* A chip on a serial line, in memory: boot ROM, stub version 2, flash, control lines, and a clock of its own that jumps to the
 * next thing that happens. Nothing here waits. Faithful where hosts go wrong: stale reply bytes, unknown opcodes, block numbers,
 * erase at BEGIN, errors one command late, frames lost when they come too early, hangs on wrong sizes.
 *
 * Source: esp-serial-protocol.md. Not shared with the flasher: frames are taken apart by code of its own. */
#ifndef OTA_TESTS_FAKE_ROM_H
#define OTA_TESTS_FAKE_ROM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <zlib.h>

#include "port/port.h"

#define FAKE_ROM_REGS 64
#define FAKE_ROM_ENTRY 0x40380e9au /* MEM_END with this entry starts the stub */
#define FAKE_ROM_APP_LOG "app: hello\r\n"

typedef enum fake_rom_mode {
    FAKE_ROM_APP,  /* runs its application: hears nothing */
    FAKE_ROM_ROM,  /* waits in the boot ROM */
    FAKE_ROM_STUB, /* a stub runs */
    FAKE_ROM_HUNG, /* until the next reset */
} fake_rom_mode;

/* Set before fake_rom_init, or any time later. All zero: nothing goes wrong. Counts start at 1; 0: never. */
typedef struct fake_rom_faults {
    uint64_t fail_call; /* this call of the port fails ... */
    int fail_errnum;    /* ... with this errno; 0: ENODEV, and so does all that follows until reopen */
    uint64_t drop_in, flip_in, insert_in, double_in;     /* this byte on the way to the chip */
    uint64_t drop_out, flip_out, insert_out, double_out; /* this byte on the way to the host */
    uint64_t lose_reply;                                 /* this frame from the chip never leaves it */
    uint64_t reset_at; /* when this byte reaches the chip it restarts by itself, into `reset_into` */
    fake_rom_mode reset_into;
    const char *crash_text;   /* printed before that */
    bool no_greeting;         /* the stub starts and does not say so */
    bool refuses_stub;        /* MEM_BEGIN: 01 06 */
    bool md5_lies;            /* one bit of every MD5 differs */
    bool refuses_batches;     /* WRITE_REG with more than one entry: 01 05 */
    uint64_t bad_sector;      /* programming of the sector with this number (from 1) fails */
    uint32_t baud_max;        /* above it the wire garbles everything */
    uint32_t driver_baud_max; /* above it set_baud says EINVAL */
    bool strap_high;          /* every reset starts the application */
    bool vanishes_on_reset;   /* ENODEV from a reset until reopen, as on USB */
    uint32_t rom_block_max;   /* 0: 0x1800 */
    uint32_t slowness;        /* erase and program times are multiplied by it; 0: 1 */
} fake_rom_faults;

typedef struct fake_rom_options {
    uint32_t chip_id;     /* 0 ESP32, 5 C3, ... */
    uint64_t flash_size;  /* 0: 4 MiB */
    uint32_t flash_id;    /* 0: from the size, vendor EF type 40 */
    fake_rom_mode starts; /* what runs when the line is opened */
    bool secure_download, flash_encrypted, secure_boot;
    bool no_lines;             /* DTR and RTS: ENOTTY, has_lines false */
    bool is_socket;            /* no rate: baud 0, no lines */
    uint16_t usb_vid, usb_pid; /* 303A:1001: USB-Serial-JTAG */
    uint32_t eco_version;
} fake_rom_options;

typedef struct fake_rom_byte {
    uint64_t at_us; /* when the host can read it */
    uint8_t byte;
} fake_rom_byte;

typedef struct fake_rom {
    ota_serial serial; /* hand out &fake.serial */
    fake_rom_options options;
    fake_rom_faults faults;
    uint64_t now_us; /* the clock */
    fake_rom_mode mode;
    uint32_t baud; /* of the chip's side */
    uint8_t *flash;
    uint32_t attached;                                     /* SPI_ATTACH came, or a stub runs */
    uint64_t calls, bytes_to_chip, bytes_to_host, replies; /* counted for the faults */
    uint64_t commands[256];                                /* by opcode */
    uint64_t total_commands, lost_frames, erased_sectors, erased_blocks, blank_skips, resets;
    uint64_t watchdog_writes;
    bool is_woken, is_gone, is_stuck; /* stuck: somebody waits for ever (a read without deadline and nothing to come) */
    bool dtr, rts, latched_download, is_rising;
    uint64_t rises_at_us;
    /* Below: of fake_rom.c. */
    fake_rom_byte *out;
    size_t out_len, out_capacity, out_pos;
    uint8_t in[0x5000];
    size_t in_len;
    bool in_escape;
    uint64_t in_started_us, busy_until_us, frame_free_us;
    uint8_t reply[128]; /* of the ROM; never cleared */
    uint32_t reply_value;
    uint8_t reply_op;
    struct {
        uint32_t address, value;
    } regs[FAKE_ROM_REGS];
    size_t reg_count;
    bool writing, deflated;
    uint64_t write_at, write_left, wire_left, erased_to, write_end;
    bool skips_blank;
    uint32_t block_size, seq;
    z_stream inflater;
    bool inflater_open, inflater_done;
    uint8_t late_status;
    bool reading;
    uint64_t read_from, read_len, read_sent;
    uint32_t pending_baud;
} fake_rom;

/* Stops the program when there is no memory. */
void fake_rom_init(fake_rom *fake, const fake_rom_options *options);
void fake_rom_free(fake_rom *fake);

/* Lets time pass, as after a reset whose outcome is looked at. */
void fake_rom_pass(fake_rom *fake, uint32_t ms);
/* Puts bytes on the wire to the host, now. */
void fake_rom_say(fake_rom *fake, const void *bytes, size_t len);
/* The value that READ_REG of `address` gives. */
void fake_rom_set_reg(fake_rom *fake, uint32_t address, uint32_t value);
uint32_t fake_rom_reg(const fake_rom *fake, uint32_t address);

#endif
