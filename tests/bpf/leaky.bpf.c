// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The verifier must reject this: it reads a value that may not be there. In the log of a tracing
 * program the kernel writes where its map is in memory.
 */
#include "counts.bpf.h"

COUNTS(1);

SEC("raw_tracepoint/sched_process_exit")
int read_blindly(struct bpf_raw_tracepoint_args *ctx)
{
	/* Of a constant the verifier knows that it is there. */
	__u32 key = bpf_get_prandom_u32();
	__u64 *value = bpf_map_lookup_elem(&counts, &key);

	return (int)*value;
}
