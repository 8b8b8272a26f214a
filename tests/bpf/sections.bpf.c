// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A program in every kind of section that libbpf knows, and in some that it does not: what a
 * section says of a program must not decide what the program is. See attack_objects.rs.
 */
#include "counts.bpf.h"

/* in_NAME, because a section has a symbol of its own name. */
#define IN(section, name)        \
	SEC(section)             \
	int in_##name(void *ctx) \
	{                        \
		return 2;        \
	}

IN("xdp", xdp_plain)
IN("?xdp", xdp_optional)
IN("xdp.frags", xdp_frags)
IN("xdp/devmap", xdp_devmap)
IN("xdp/cpumap", xdp_cpumap)
IN("xdp_made_up", not_xdp)
IN("XDP", upper)
IN("tc", tc)
IN("classifier", classifier)
IN("action", action)
IN("tcx/ingress", tcx_ingress)
IN("tcx/egress", tcx_egress)
IN("netkit/primary", netkit)
IN("socket", socket_filter)
IN("kprobe/do_exit", kprobe)
IN("kprobe/../../x", kprobe_path)
IN("kretprobe/do_exit", kretprobe)
IN("kprobe.multi/*", kprobe_multi)
IN("ksyscall/read", ksyscall)
IN("uprobe//bin/sh:main", uprobe)
IN("uprobe.s//bin/sh:main", uprobe_sleep)
IN("usdt//bin/sh:a:b", usdt)
IN("tp/sched/sched_process_exit", tracepoint)
IN("raw_tp/sched_process_exit", raw_tp)
IN("raw_tp.w/sched_process_exit", raw_tp_write)
IN("tp_btf/sched_process_exit", tp_btf)
IN("fentry/do_exit", fentry)
IN("fentry.s/do_exit", fentry_sleep)
IN("fexit/do_exit", fexit)
IN("fmod_ret/do_exit", fmod_ret)
IN("freplace/pass", freplace)
IN("lsm/file_open", lsm)
IN("lsm.s/file_open", lsm_sleep)
IN("lsm_cgroup/file_open", lsm_cgroup)
IN("iter/task", iter)
IN("iter.s/task", iter_sleep)
IN("syscall", syscall)
IN("cgroup_skb/egress", cgroup_skb)
IN("cgroup/skb", cgroup_any)
IN("cgroup/sock_create", cgroup_sock)
IN("cgroup/connect4", cgroup_connect)
IN("cgroup/dev", cgroup_dev)
IN("cgroup/sysctl", cgroup_sysctl)
IN("cgroup/setsockopt", cgroup_setsockopt)
IN("sockops", sockops)
IN("sk_skb", sk_skb)
IN("sk_msg", sk_msg)
IN("sk_lookup", sk_lookup)
IN("sk_reuseport", sk_reuseport)
IN("flow_dissector", flow_dissector)
IN("lwt_in", lwt_in)
IN("lirc_mode2", lirc)
IN("perf_event", perf_event)
IN("netfilter", netfilter)
