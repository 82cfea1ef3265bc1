# Waits until the host asks the built-in guest to end, and passes it on to the command.
#
# The host asks by the ACPI power button, as far as the kernel has drivers for it, or by Ctrl-Alt-Del, which needs none:
# the kernel makes it a SIGINT for the process that it is told here.

told=
end() {
    [ "$told" ] && return
    told=1
    echo "hostpart guest: asked to end"
    until read -r command </run/command; do sleep 0.1; done 2>/dev/null
    kill -TERM -"$command"
    sleep 5
    kill -KILL -"$command"
    exit
}
trap end INT USR1
echo $$ >/run/watch
echo $$ >/proc/sys/kernel/cad_pid
echo 0 >/proc/sys/kernel/ctrl-alt-del
for event in /sys/class/input/event*; do
    [ -e "$event/device/name" ] && read -r name <"$event/device/name" && [ "$name" = "Power Button" ] || continue
    # A read waits for an event, and this device has no other than that it was pressed.
    (dd if="/dev/input/${event##*/}" of=/dev/null bs=1536 count=1 2>/dev/null && kill -USR1 $$) &
done
sleep 2147483647 &
while :; do wait; done
