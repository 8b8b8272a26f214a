// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Valid programs that keep the verifier busy for half a second and more each. At each of sixteen
 * branches it learns nothing and the sum becomes another one, which is asked for at the end: it
 * walks all 65,536 ways to there, 590,000 instructions of the million that it allows.
 */
#include "counts.bpf.h"

#define STALL(name)                                                     \
	SEC("xdp")                                                      \
	int name(struct xdp_md *ctx)                                    \
	{                                                               \
		__u64 sum;                                              \
		asm volatile("r6 = 0\n"                                 \
			     ".rept 16\n"                               \
			     "call %[random]\n"                         \
			     "if r0 > 5 goto +1\n"                      \
			     "r6 += 1\n"                                \
			     "r6 <<= 1\n"                               \
			     ".endr\n"                                  \
			     "%[sum] = r6\n"                            \
			     : [sum] "=r"(sum)                          \
			     : [random] "i"(BPF_FUNC_get_prandom_u32)   \
			     : "r0", "r1", "r2", "r3", "r4", "r5", "r6"); \
		return sum > 100 ? XDP_DROP : XDP_PASS;                 \
	}

STALL(stall_0)
STALL(stall_1)
STALL(stall_2)
STALL(stall_3)
STALL(stall_4)
STALL(stall_5)
