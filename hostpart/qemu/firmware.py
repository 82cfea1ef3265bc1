"""A firmware of a few hundred bytes that shows whether a virtual x86 processor runs what a kernel needs.

It goes from the reset vector by way of protected mode into 64-bit mode with paging on, executes ordinary
instructions from RAM, checks what they computed and writes the verdict to QEMU's ``isa-debug-exit`` at port 0xf4,
which ends QEMU with the exit status ``verdict * 2 + 1``. What it leaves out: interrupts, ring 3, more than one vCPU.

Running it is :mod:`hostpart.qemu.accelerator`'s.
"""

from __future__ import annotations

__all__ = ["DEVICE", "PASSED", "WRONG", "image"]

DEVICE = "isa-debug-exit,iobase=0xf4,iosize=0x4"
PASSED = 0x2A * 2 + 1  # exit statuses of QEMU; its own are 0, 1 and, for signals, negative
WRONG = 0x2B * 2 + 1

_SIZE = 1 << 16  # bytes; QEMU maps a firmware so that it ends at 4 GiB, and wants a multiple of 64 KiB
_START = 0xF000  # where the code begins in the image; by its address it is at 0xFFFFF000
_RESET = 0xFFF0  # where a processor begins

# Bytes, and in the comments what they are in AT&T's notation. Labels are offsets from the beginning of _CODE.
# Descriptors have their "accessed" bit set from the beginning: a processor that had to set it would write to ROM.
_CODE = bytes.fromhex(
    # -- 16 bits: a processor after reset, CS based at 0xFFFF0000
    "fa"  # 000 cli
    "2e 66 0f 01 16 80 f1"  # 001 lgdtl %cs:0xf180             the table's pointer, at 180
    "66 b8 11 00 00 00"  # 008 movl $0x11, %eax               PE, ET; clears CD and NW, which a reset sets
    "0f 22 c0"  # 00e movl %eax, %cr0
    "66 ea 19 f0 ff ff 08 00"  # 011 ljmpl $0x08, $0xfffff019
    # -- 32 bits, flat, no paging
    "b8 10 00 00 00"  # 019 movl $0x10, %eax
    "8e d8"  # 01e movl %eax, %ds
    "8e c0"  # 020 movl %eax, %es
    "8e d0"  # 022 movl %eax, %ss
    # page tables: PML4 at 0x1000, PDPT at 0x2000, four directories from 0x3000 of 2 MiB pages, all 4 GiB as they are
    "31 c0"  # 024 xorl %eax, %eax
    "bf 00 10 00 00"  # 026 movl $0x1000, %edi
    "b9 00 18 00 00"  # 02b movl $0x1800, %ecx                 six pages
    "fc"  # 030 cld
    "f3 ab"  # 031 rep stosl
    "c7 05 00 10 00 00 03 20 00 00"  # 033 movl $0x2003, 0x1000
    "bf 00 20 00 00"  # 03d movl $0x2000, %edi
    "b8 03 30 00 00"  # 042 movl $0x3003, %eax
    "89 07"  # 047 movl %eax, (%edi)                           the four directories
    "83 c7 08"  # 049 addl $8, %edi
    "05 00 10 00 00"  # 04c addl $0x1000, %eax
    "3d 03 70 00 00"  # 051 cmpl $0x7003, %eax
    "75 ef"  # 056 jne 047
    "bf 00 30 00 00"  # 058 movl $0x3000, %edi
    "b8 83 00 00 00"  # 05d movl $0x83, %eax                   present, writable, 2 MiB
    "89 07"  # 062 movl %eax, (%edi)
    "83 c7 08"  # 064 addl $8, %edi
    "05 00 00 20 00"  # 067 addl $0x200000, %eax
    "73 f4"  # 06c jnc 062                                     until 4 GiB
    # the 64-bit part goes to RAM, where a kernel would be
    "be ac f0 ff ff"  # 06e movl $0xfffff0ac, %esi
    "bf 00 00 01 00"  # 073 movl $0x10000, %edi
    "b9 ad 00 00 00"  # 078 movl $0xad, %ecx
    "f3 a4"  # 07d rep movsb
    "b8 20 06 00 00"  # 07f movl $0x620, %eax                  PAE, OSFXSR, OSXMMEXCPT
    "0f 22 e0"  # 084 movl %eax, %cr4
    "b8 00 10 00 00"  # 087 movl $0x1000, %eax
    "0f 22 d8"  # 08c movl %eax, %cr3
    "b9 80 00 00 c0"  # 08f movl $0xc0000080, %ecx             EFER
    "0f 32"  # 094 rdmsr
    "0d 00 01 00 00"  # 096 orl $0x100, %eax                   LME
    "0f 30"  # 09b wrmsr
    "b8 13 00 00 80"  # 09d movl $0x80000013, %eax             PG, ET, MP, PE
    "0f 22 c0"  # 0a2 movl %eax, %cr0
    "ea 00 00 01 00 18 00"  # 0a5 ljmpl $0x18, $0x10000
    # -- 64 bits, at 0x10000. KVM's own emulator knows few SSE instructions and no VEX prefix: a KVM that emulates
    # kernel mode and does not execute it, as kvm_pvm does with a guest not made for it, stops here.
    "bc 00 90 00 00"  # 0ac movl $0x9000, %esp
    "0f 31"  # 0b1 rdtsc
    "48 c1 e2 20"  # 0b3 shlq $32, %rdx
    "4c 8d 04 10"  # 0b7 leaq (%rax, %rdx), %r8
    "b8 34 12 00 00"  # 0bb movl $0x1234, %eax
    "66 0f ef c0"  # 0c0 pxor %xmm0, %xmm0
    "66 0f c4 c0 02"  # 0c4 pinsrw $2, %eax, %xmm0             0x1234 << 32
    "66 0f 6f c8"  # 0c9 movdqa %xmm0, %xmm1
    "b9 88 13 00 00"  # 0cd movl $5000, %ecx
    "31 db"  # 0d2 xorl %ebx, %ebx
    "31 f6"  # 0d4 xorl %esi, %esi
    "66 0f d4 c1"  # 0d6 paddq %xmm1, %xmm0
    "48 01 cb"  # 0da addq %rcx, %rbx
    "53"  # 0dd pushq %rbx
    "f6 c1 01"  # 0de testb $1, %cl
    "48 0f 45 f1"  # 0e1 cmovnzq %rcx, %rsi
    "5b"  # 0e5 popq %rbx
    "ff c9"  # 0e6 decl %ecx
    "75 ec"  # 0e8 jnz 0d6
    "f3 0f 7f 44 24 df"  # 0ea movdqu %xmm0, -0x21(%rsp)       not aligned
    "48 8b 44 24 df"  # 0f0 movq -0x21(%rsp), %rax
    "48 ba 00 00 00 00 d4 99 63 01"  # 0f5 movabsq $(0x1234 * 5001 << 32), %rdx
    "48 39 d0"  # 0ff cmpq %rdx, %rax
    "75 51"  # 102 jne 155
    "48 81 fb e4 c5 be 00"  # 104 cmpq $12502500, %rbx         1 + 2 + … + 5000
    "75 48"  # 10b jne 155
    "ff ce"  # 10d decl %esi                                   the last odd one was 1
    "75 44"  # 10f jnz 155
    # where CPUID says that there is BMI2, a kernel's decompressor uses it
    "31 c0"  # 111 xorl %eax, %eax
    "0f a2"  # 113 cpuid
    "83 f8 07"  # 115 cmpl $7, %eax
    "72 22"  # 118 jb 13c
    "b8 07 00 00 00"  # 11a movl $7, %eax
    "31 c9"  # 11f xorl %ecx, %ecx
    "0f a2"  # 121 cpuid
    "f6 c7 01"  # 123 testb $1, %bh                            leaf 7, EBX, bit 8
    "74 14"  # 126 jz 13c
    "b8 05 00 00 00"  # 128 movl $5, %eax
    "b9 03 00 00 00"  # 12d movl $3, %ecx
    "c4 e2 71 f7 d0"  # 132 shlx %ecx, %eax, %edx
    "83 fa 28"  # 137 cmpl $40, %edx
    "75 19"  # 13a jne 155
    "0f 31"  # 13c rdtsc                                       must have moved on
    "48 c1 e2 20"  # 13e shlq $32, %rdx
    "48 01 d0"  # 142 addq %rdx, %rax
    "4c 39 c0"  # 145 cmpq %r8, %rax
    "74 0b"  # 148 je 155
    "e4 61"  # 14a inb $0x61, %al
    "e6 80"  # 14c outb %al, $0x80
    "b0 2a"  # 14e movb $0x2a, %al                             PASSED
    "e6 f4"  # 150 outb %al, $0xf4
    "f4"  # 152 hlt
    "eb fd"  # 153 jmp 152
    "b0 2b"  # 155 movb $0x2b, %al                             WRONG
    "eb f7"  # 157 jmp 150
    "00 00 00 00 00 00 00"  # 159
    # -- the descriptor table
    "00 00 00 00 00 00 00 00"  # 160
    "ff ff 00 00 00 9b cf 00"  # 168 selector 0x08: code of 32 bits, 4 GiB
    "ff ff 00 00 00 93 cf 00"  # 170 selector 0x10: data, 4 GiB
    "ff ff 00 00 00 9b af 00"  # 178 selector 0x18: code of 64 bits
    "1f 00 60 f1 ff ff"  # 180 limit, address 0xfffff160
)


def image(code: bytes = _CODE) -> bytes:
    """Return a flat firmware of 64 KiB for QEMU's ``-bios``.

    :param code: what the reset vector jumps to, at 0xFFFFF000, in 16-bit mode; at most 4,080 bytes
    :raises ValueError: where it is longer
    """
    if len(code) > _RESET - _START:
        raise ValueError(f"{len(code)} bytes of code do not fit below the reset vector")
    whole = bytearray(b"\xf4" * _SIZE)  # hlt
    whole[_START : _START + len(code)] = code
    whole[_RESET : _RESET + 3] = b"\xe9" + (_START - _RESET - 3 & 0xFFFF).to_bytes(2, "little")  # jmp, 16 bits
    return bytes(whole)
