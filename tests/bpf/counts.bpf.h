/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What most test objects share: the headers, the licence, and COUNTS(n), an array map
 * `counts` of n times u64 with count(key), which adds one to an element of it.
 */
#ifndef BPFGATE_COUNTS_H
#define BPFGATE_COUNTS_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#define COUNTS(n)                                                       \
	struct {                                                        \
		__uint(type, BPF_MAP_TYPE_ARRAY);                       \
		__uint(max_entries, n);                                 \
		__type(key, __u32);                                     \
		__type(value, __u64);                                   \
	} counts SEC(".maps");                                          \
	static __always_inline __attribute__((unused)) void count(__u32 key) \
	{                                                               \
		__u64 *value = bpf_map_lookup_elem(&counts, &key);      \
		if (value)                                              \
			__sync_fetch_and_add(value, 1);                 \
	}                                                               \
	_Static_assert(n > 0, "an array map has at least one element")

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#endif
