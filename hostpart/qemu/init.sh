#!/bin/busybox sh
# The first process of the built-in guest: it sets up what a program expects to find, has /etc/hostpart/command run
# (run.sh) and the host's wish to end it passed on (watch.sh), says the exit status and powers off. What is in
# /etc/hostpart differs from guest to guest; all else is the same for all.

busybox=/bin/busybox
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sys /sys
$busybox mount -t devtmpfs dev /dev
read -r _ _ release _ </proc/version
cpus=$($busybox nproc)
[ "$cpus" = 1 ] && noun=CPU || noun=CPUs
echo "hostpart guest: Linux $release, $cpus $noun"

$busybox mount -t tmpfs -o mode=755 run /run
$busybox mount -t tmpfs -o mode=1777 tmp /tmp
export PATH=/usr/bin HOME=/root LANG=C.UTF-8 TERM=dumb NO_COLOR=1 LD_LIBRARY_PATH=/usr/lib
export HOSTPART_RUNTIME_DIR=/run/hostpart PYTHONDONTWRITEBYTECODE=1 SHELL=/bin/sh USER=root LOGNAME=root
$busybox --install -s /usr/bin
cd /root || cd /

for module in button evdev; do
    [ -e /lib/modules/$module.ko ] && insmod /lib/modules/$module.ko
done

# A terminal by its own name can be the command's, so that Ctrl-C gets there; /dev/console can't.
console=/dev/console
read -r active </sys/class/tty/console/active && [ -c "/dev/${active##* }" ] && console=/dev/${active##* }
exec 3>&1
results=
if [ -e /etc/hostpart/results ]; then
    read -r results </etc/hostpart/results
    # Exactly the bytes that the command writes: no line end is translated, nothing that comes in is echoed.
    if stty -F "$results" 115200 raw -echo 2>/dev/null; then
        exec 3>"$results"
    else
        echo "hostpart guest: there is no $results; the results go to the console" >&2
        results=
    fi
fi

# Two in a pipeline, though nothing goes through it: of what is started with & a shell has SIGINT ignored for good, and
# the one needs it for Ctrl-Alt-Del, the other for Ctrl-C.
sh /etc/hostpart-guest/watch 3>&- >/dev/console |
    setsid -c sh /etc/hostpart-guest/run "$console" <"$console" >&3 2>"$console" 3>&-
status=$?

# What is still on its way through a serial port would be lost: to set it waits until it has gone out.
exec 3>&-
[ "$results" ] && stty -F "$results" raw
echo "hostpart guest: exit status $status"
stty -F "$console" onlcr
# A reset tells the host what powering off could not: that the command has failed.
if [ "$status" != 0 ] && grep -q "hostpart.failure=reset" /proc/cmdline; then
    reboot -f
fi
poweroff -f
