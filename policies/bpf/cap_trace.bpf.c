// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Counts the capability checks of the kernel: who was checked for what, by which system call and along which way
 * through the kernel, and what came of it. `bpfgate caps trace` is its reader.
 *
 * It counts in the kernel and wakes nobody. Equal checks are one entry of `checks`; the reader looks at the entries
 * now and then. What finds no room is counted in `totals`, so that the reader can say how much it does not know.
 *
 * Three programs look at the same function, cap_capable() of security/commoncap.c, one of which is attached:
 *
 *   on_tracepoint  since Linux 6.14: the verdict and the user namespace; not whether the check is left out of audit
 *   on_fexit       where functions can be traced: all of it
 *   on_kprobe      else: no verdict
 *
 * on_syscall_exit finds out whether a system call succeeded although a check in it was denied.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#define COMM_LEN 16 /* TASK_COMM_LEN of the kernel */
#define FRAMES 8 /* of a stack, from cap_capable() on; a power of two */
#define NAMES_LEN 512 /* the names of so many functions; longer ones are cut off */
#define WINDOW 64 /* words of the kernel's stack in which the caller of cap_capable() is looked for; a power of two */
#define FOLLOWED 8 /* different checks that are denied within one system call, and followed to its end; a power of two */
#define NONE 0xffffffff

/* What the programs read of the kernel's types; where the fields are is found out at load (CO-RE). */
#define KERNEL_TYPE __attribute__((preserve_access_index))

struct ns_common {
	unsigned int inum;
} KERNEL_TYPE;

struct user_namespace {
	struct ns_common ns;
} KERNEL_TYPE;

struct pid_namespace {
	struct ns_common ns;
} KERNEL_TYPE;

struct upid {
	int nr;
	struct pid_namespace *ns;
} KERNEL_TYPE;

struct pid {
	unsigned int level;
	struct upid numbers[1];
} KERNEL_TYPE;

struct thread_info {
	unsigned long flags;
	__u32 status;
} KERNEL_TYPE;

struct task_struct {
	struct thread_info thread_info;
	unsigned int flags;
	struct task_struct *group_leader;
	struct pid *thread_pid;
} KERNEL_TYPE;

/* include/linux/sched.h */
#define PF_EXITING 0x00000004
#define PF_KTHREAD 0x00200000

/*
 * The system call that a thread is in, from the registers that it entered the kernel with. Elsewhere than on these
 * machines it is not known.
 */
#if defined(__TARGET_ARCH_x86)
struct pt_regs {
	unsigned long cx, dx, si, di, orig_ax;
} KERNEL_TYPE;
#define SYSCALL_NUMBER(regs) ((__s32)(regs)->orig_ax) /* -1: a fault or an interrupt */
#define SYSCALL_ARG1(regs) ((regs)->di)
#define SYSCALL_ARG2(regs) ((regs)->si)
#define IS_COMPAT(task) ((task)->thread_info.status & 2) /* TS_COMPAT */
#define BPF_SYSCALL 321
#define KPROBE_ARG2(ctx) (((struct pt_regs *)(ctx))->si)
#define KPROBE_ARG3(ctx) (((struct pt_regs *)(ctx))->dx)
#define KPROBE_ARG4(ctx) (((struct pt_regs *)(ctx))->cx)
#elif defined(__TARGET_ARCH_arm64)
struct user_pt_regs {
	__u64 regs[31];
} KERNEL_TYPE;
struct pt_regs {
	struct user_pt_regs user_regs;
	__u64 orig_x0;
	__s32 syscallno;
} KERNEL_TYPE;
#define SYSCALL_NUMBER(regs) ((regs)->syscallno) /* NO_SYSCALL is -1 */
#define SYSCALL_ARG1(regs) ((regs)->orig_x0)
#define SYSCALL_ARG2(regs) ((regs)->user_regs.regs[1])
#define IS_COMPAT(task) ((task)->thread_info.flags & (1 << 22)) /* TIF_32BIT */
#define BPF_SYSCALL 280
#define KPROBE_ARG2(ctx) (((struct user_pt_regs *)(ctx))->regs[1])
#define KPROBE_ARG3(ctx) (((struct user_pt_regs *)(ctx))->regs[2])
#define KPROBE_ARG4(ctx) (((struct user_pt_regs *)(ctx))->regs[3])
#endif

enum verdict { GRANTED, DENIED, NOT_SEEN };
enum audit { AUDIT_NOT_SEEN, AUDIT_YES, AUDIT_NO };
enum syscall { NO_SYSCALL = -1, SYSCALL_NOT_SEEN = -2 };

/* Equal checks have an equal one of these. The reader knows this layout, and that of `tally` and `total`. */
struct check {
	__u32 tgid;
	__u32 tid;
	__u64 cgroup;
	__u64 stack; /* the key in `stacks`; 0: none */
	__u32 uid; /* real user id, in the initial user namespace */
	__u32 userns; /* where the capability was asked for: the inode of that user namespace */
	__s32 syscall; /* its number, or enum syscall */
	__u32 bpf_command; /* in bpf(2) only; else NONE */
	__u32 bpf_type; /* of the program or map that is made; else NONE */
	__u8 cap;
	__u8 verdict;
	__u8 audit;
	__u8 compat; /* the system call is one of a 32-bit program: the numbers are others */
	char comm[COMM_LEN];
};

struct tally {
	__u64 count;
	__u64 harmless; /* of them denied in a system call that succeeded */
	__u64 open; /* of them denied in the system call that goes on */
	__u64 first; /* CLOCK_MONOTONIC, in nanoseconds */
	__u64 last;
};

struct total {
	__u64 seen; /* checks within the scope */
	__u64 lost; /* of them in no tally: `checks` is full */
	__u64 unplaced; /* of them with a stack that could not be taken, or for which `stacks` is full */
	__u64 unfollowed; /* denied, and what came of the system call is not known */
};

struct scratch {
	struct check check;
	__u64 frames[FRAMES]; /* return addresses */
	__u64 base; /* where the context is: on the kernel's stack */
	__u64 window[WINDOW];
	__u64 place; /* where the caller was found last, and how often */
	__u64 found;
	char names[NAMES_LEN];
};

struct followed {
	__u32 count;
	struct check checks[FOLLOWED];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct check);
	__type(value, struct tally);
} checks SEC(".maps");

/* The names of the functions on the way to a check: no address leaves the kernel. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2048);
	__type(key, __u64);
	__type(value, char[NAMES_LEN]);
} stacks SEC(".maps");

/* Return addresses in functions that ask for memory overcommit and nothing else, with what is in `stacks` for them. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, __u64);
	__type(value, __u64);
} overcommit SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct total);
} totals SEC(".maps");

/* Threads whose system call is followed to its end. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct followed);
} following SEC(".maps");

/* For scope PROCESSES: the reader fills it in before it attaches. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, __u32); /* thread group id */
	__type(value, __u32);
} processes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratches SEC(".maps");

/* An update of a full entry needs an empty one to begin with, and it is too large for the stack. */
static const struct followed nobody;

/* Set before load; the policy says in which range. As it stands nothing is counted. */
enum scope { NOTHING, CGROUP, PROCESSES, EVERYTHING };
volatile const __u32 scope = NOTHING;
volatile const __u64 scope_cgroup = 0; /* the id of a cgroup; with all below it */
volatile const __u32 reader = 0; /* in scope EVERYTHING this thread group is left out */
volatile const __u32 pid_namespace = 0; /* show pids as this one has them; 0: the initial one */
volatile const __u32 follow = 0; /* whether on_syscall_exit is attached */

/* How many threads are in `following`. */
__u64 waiting;

/* What stands for a stack must not tell where the kernel is: it is mixed with this, which no reader gets. */
__u64 salt;

static __always_inline __u64 get_salt(void)
{
	__u64 fresh;

	if (!salt) {
		fresh = (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32() | 1;
		__sync_val_compare_and_swap(&salt, 0, fresh);
	}
	return salt;
}

/* Its number in the reader's namespace; 0: it is not in there. */
static __always_inline __u32 number_of(struct task_struct *task)
{
	struct pid *pid = BPF_CORE_READ(task, thread_pid);
	unsigned int level = BPF_CORE_READ(pid, level);
	struct upid *numbers = (void *)pid + bpf_core_field_offset(struct pid, numbers);

	/* MAX_PID_NS_LEVEL of the kernel is 32. */
	for (unsigned int i = 0; i <= 32; i++) {
		struct upid *upid = (void *)numbers + i * bpf_core_type_size(struct upid);

		if (i > level)
			break;
		if (BPF_CORE_READ(upid, ns, ns.inum) == pid_namespace)
			return BPF_CORE_READ(upid, nr);
	}
	return 0;
}

static __always_inline bool is_below(__u64 cgroup)
{
	/* The deepest a cgroup can be on common machines is far less; the walk ends at the thread's own. */
	for (int level = 0; level < 64; level++) {
		__u64 id = bpf_get_current_ancestor_cgroup_id(level);

		if (!id)
			return false;
		if (id == cgroup)
			return true;
	}
	return false;
}

static __always_inline bool is_in_scope(__u32 tgid)
{
	switch (scope) {
	case CGROUP:
		return is_below(scope_cgroup);
	case PROCESSES:
		return bpf_map_lookup_elem(&processes, &tgid);
	case EVERYTHING:
		return tgid != reader;
	default:
		return false;
	}
}

static __always_inline void note_syscall(struct check *check, struct task_struct *task)
{
	check->syscall = NO_SYSCALL;
	check->bpf_command = NONE;
	check->bpf_type = NONE;
	check->compat = 0;
	if (task->flags & PF_KTHREAD)
		return;
#ifdef SYSCALL_NUMBER
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);

	check->syscall = SYSCALL_NUMBER(regs);
	if (check->syscall < 0) {
		check->syscall = NO_SYSCALL;
		return;
	}
	check->compat = !!IS_COMPAT(task);
	if (check->syscall != BPF_SYSCALL || check->compat)
		return;
	check->bpf_command = SYSCALL_ARG1(regs);
	/* Both attributes begin with the type. The page may be swapped out: then it is not known. */
	if (check->bpf_command == BPF_MAP_CREATE || check->bpf_command == BPF_PROG_LOAD) {
		if (bpf_probe_read_user(&check->bpf_type, sizeof(check->bpf_type), (void *)SYSCALL_ARG2(regs)))
			check->bpf_type = NONE;
	}
#else
	check->syscall = SYSCALL_NOT_SEEN;
#endif
}

/*
 * Walking a stack takes some microseconds, more than all the rest, and nearly all checks come from the accounting of
 * memory. These are known by the one function that calls cap_capable() for them. Where its return address is, seen from
 * the context of the program, is learned from the stacks that are walked: it is the same for all.
 */
__u64 caller_place; /* bytes above the context */
__u64 caller_proven; /* so many walks found it there, and nowhere else */
#define PROOFS 3

static long find_caller(__u32 index, struct scratch **context)
{
	struct scratch *scratch = *context;

	if (scratch->window[index & (WINDOW - 1)] == scratch->frames[1]) {
		scratch->place = index * 8;
		scratch->found++;
	}
	return 0;
}

static __always_inline void learn_place(struct scratch *scratch, __u64 base)
{
	__u64 caller = 0;

	if (caller_proven >= PROOFS) {
		bpf_probe_read_kernel(&caller, sizeof(caller), (void *)(base + caller_place));
		if (caller != scratch->frames[1])
			caller_proven = 0;
		return;
	}
	if (bpf_probe_read_kernel(scratch->window, sizeof(scratch->window), (void *)base))
		return;
	scratch->found = 0;
	bpf_loop(WINDOW, find_caller, &scratch, 0);
	/* One of two is left over from an earlier call: that proves nothing. */
	if (scratch->found != 1)
		return;
	if (scratch->place != caller_place)
		caller_proven = 0;
	caller_place = scratch->place;
	caller_proven++;
}

/* What stands for the stack of a check of memory accounting; 0: it is none, or that is not known yet. */
static __always_inline __u64 known_stack(__u64 base)
{
	__u64 caller, *hash;

	if (caller_proven < PROOFS ||
	    bpf_probe_read_kernel(&caller, sizeof(caller), (void *)(base + caller_place)))
		return 0;
	hash = bpf_map_lookup_elem(&overcommit, &caller);
	return hash ? *hash : 0;
}

/*
 * Whether the second name is one of memory accounting. Then the names end with it: what is before it on the way makes no
 * difference, and is not looked at again.
 */
static __always_inline bool is_overcommit(char *names)
{
	static const char security[] = "security_vm_enough_memory", cap[] = "cap_vm_enough_memory";
	bool is = false;

	for (__u32 i = 0; i < NAMES_LEN / 4; i++) {
		if (names[i] != ' ')
			continue;
		if (is) {
			names[i] = 0;
			return true;
		}
		if (bpf_strncmp(names + i + 1, sizeof(security) - 1, security) &&
		    bpf_strncmp(names + i + 1, sizeof(cap) - 1, cap))
			return false;
		is = true;
	}
	return false;
}

/* %pB: the function that contains the call, even if the call is the last of it. */
static const char FORMAT[] = "%pB %pB %pB %pB %pB %pB %pB %pB";

/* The stack gets its names when it is seen first; from then on its hash will do. 0: it has none. */
static __always_inline __u64 note_stack(void *ctx, struct scratch *scratch, __u64 skip)
{
	__u64 hash, base;
	long got;

	scratch->base = (__u64)ctx;
	/* Read back as a number, with which the verifier lets everybody compute. */
	base = *(volatile __u64 *)&scratch->base;
	hash = known_stack(base);
	if (hash)
		return hash;
	got = bpf_get_stack(ctx, scratch->frames, sizeof(scratch->frames), skip);
	if (got <= 0)
		return 0;
	hash = get_salt();
	for (__u32 i = 0; i < FRAMES; i++) {
		/* What is behind the end is of an earlier stack. */
		if (i >= (__u32)got / 8)
			scratch->frames[i] = 0;
		hash = (hash ^ scratch->frames[i]) * 0x9e3779b97f4a7c15;
		hash ^= hash >> 29;
	}
	learn_place(scratch, base);
	if (bpf_map_lookup_elem(&stacks, &hash))
		return hash;
	got = bpf_snprintf(scratch->names, sizeof(scratch->names), FORMAT, scratch->frames, sizeof(scratch->frames));
	if (got <= 0)
		return 0;
	if (is_overcommit(scratch->names)) {
		__u64 *known = bpf_map_lookup_elem(&overcommit, &scratch->frames[1]);

		if (known)
			return *known;
		bpf_map_update_elem(&overcommit, &scratch->frames[1], &hash, BPF_NOEXIST);
	}
	return bpf_map_update_elem(&stacks, &hash, scratch->names, BPF_ANY) ? 0 : hash;
}

/* Remembers a denied check until its system call ends. */
static __always_inline void follow_to_end(struct check *check, struct tally *tally, struct total *total, __u32 tid)
{
	struct followed *followed;

	if (__sync_fetch_and_add(&tally->open, 1) > 0)
		return;
	followed = bpf_map_lookup_elem(&following, &tid);
	if (!followed) {
		if (!bpf_map_update_elem(&following, &tid, &nobody, BPF_NOEXIST))
			__sync_fetch_and_add(&waiting, 1);
		followed = bpf_map_lookup_elem(&following, &tid);
	}
	if (!followed || followed->count >= FOLLOWED) {
		tally->open = 0;
		total->unfollowed++;
		return;
	}
	followed->checks[followed->count & (FOLLOWED - 1)] = *check;
	followed->count++;
}

static __always_inline int on_check(void *ctx, struct user_namespace *userns, int cap, enum verdict verdict,
				    enum audit audit, __u64 skip)
{
	__u64 ids = bpf_get_current_pid_tgid(), now = bpf_ktime_get_ns();
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	__u32 zero = 0, tgid = ids >> 32, tid = ids;
	struct scratch *scratch;
	struct check *check;
	struct tally *tally;
	struct total *total;

	if (pid_namespace) {
		struct task_struct *leader = BPF_CORE_READ(task, group_leader);

		tgid = number_of(leader);
		tid = number_of(task);
	}
	if (!is_in_scope(tgid))
		return 0;
	scratch = bpf_map_lookup_elem(&scratches, &zero);
	total = bpf_map_lookup_elem(&totals, &zero);
	if (!scratch || !total)
		return 0;
	total->seen++;
	check = &scratch->check;
	check->tgid = tgid;
	check->tid = tid;
	check->cgroup = bpf_get_current_cgroup_id();
	check->uid = bpf_get_current_uid_gid();
	check->userns = BPF_CORE_READ(userns, ns.inum);
	check->cap = cap;
	check->verdict = verdict;
	check->audit = audit;
	bpf_get_current_comm(check->comm, sizeof(check->comm));
	note_syscall(check, task);
	check->stack = note_stack(ctx, scratch, skip);
	if (!check->stack)
		total->unplaced++;

	tally = bpf_map_lookup_elem(&checks, check);
	if (!tally) {
		struct tally first = { .first = now };

		bpf_map_update_elem(&checks, check, &first, BPF_NOEXIST);
		tally = bpf_map_lookup_elem(&checks, check);
	}
	if (!tally) {
		total->lost++;
		return 0;
	}
	/* What is counted and neither harmless nor open is denied, so that it is opened before it is counted. */
	if (follow && verdict == DENIED && check->syscall >= 0 && !(task->flags & PF_EXITING)) /* exit(2) has no end */
		follow_to_end(check, tally, total, ids);
	__sync_fetch_and_add(&tally->count, 1);
	tally->last = now;
	return 0;
}

/* TP_PROTO(cred, target_ns, capable_ns, cap, ret) of include/trace/events/capability.h */
SEC("raw_tracepoint/cap_capable")
int on_tracepoint(struct bpf_raw_tracepoint_args *ctx)
{
	return on_check(ctx, (struct user_namespace *)ctx->args[1], ctx->args[3],
			(int)ctx->args[4] ? DENIED : GRANTED, AUDIT_NOT_SEEN, 2);
}

#define NOAUDIT 2 /* CAP_OPT_NOAUDIT of include/linux/security.h, since Linux 5.1 */

/* cap_capable(cred, target_ns, cap, opts), and behind its arguments what it returned */
SEC("fexit/cap_capable")
int on_fexit(__u64 *ctx)
{
	return on_check(ctx, (struct user_namespace *)ctx[1], ctx[2], (int)ctx[4] ? DENIED : GRANTED,
			ctx[3] & NOAUDIT ? AUDIT_NO : AUDIT_YES, 2);
}

#ifdef KPROBE_ARG2
SEC("kprobe.multi/cap_capable")
int on_kprobe(void *ctx)
{
	return on_check(ctx, (struct user_namespace *)KPROBE_ARG2(ctx), KPROBE_ARG3(ctx), NOT_SEEN,
			KPROBE_ARG4(ctx) & NOAUDIT ? AUDIT_NO : AUDIT_YES, 0);
}
#endif

/* TP_PROTO(regs, ret) of include/trace/events/syscalls.h: nearly always there is nothing to do. */
SEC("raw_tracepoint/sys_exit")
int on_syscall_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct followed *followed;
	__s64 result;
	__u32 tid;

	if (!waiting)
		return 0;
	tid = bpf_get_current_pid_tgid();
	followed = bpf_map_lookup_elem(&following, &tid);
	if (!followed)
		return 0;
	result = ctx->args[1];
	for (__u32 i = 0; i < FOLLOWED; i++) {
		struct tally *tally;

		if (i >= followed->count)
			break;
		tally = bpf_map_lookup_elem(&checks, &followed->checks[i]);
		if (!tally)
			continue;
		/* Errors are -1 to -4095: MAX_ERRNO of include/linux/err.h. */
		if (result >= 0 || result < -4095)
			tally->harmless += tally->open;
		tally->open = 0;
	}
	if (!bpf_map_delete_elem(&following, &tid))
		__sync_fetch_and_add(&waiting, -1);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
